import pytest
import torch
from diffusers import LCMScheduler

from engines.sampling import guide, lcm_step, lcm_timesteps, linear_schedule, restored_generator, seeded_generator


def test_four_steps_are_those_of_the_card():
    assert lcm_timesteps(4) == (999, 759, 499, 259)


@pytest.mark.parametrize("steps", range(1, 51))
def test_timesteps_equal_those_of_diffusers(steps: int):
    scheduler = LCMScheduler(beta_schedule="linear")
    scheduler.set_timesteps(steps)
    assert list(lcm_timesteps(steps)) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_a_number_of_steps_off_the_grid_is_refused(steps: int):
    with pytest.raises(ValueError, match="1 to 50"):
        lcm_timesteps(steps)


def test_abar_has_the_known_values():
    abar = linear_schedule().alphas_cumprod
    assert abar[[999, 759, 499, 259]].tolist() == pytest.approx([0.001579, 0.020707, 0.161812, 0.550145], abs=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_step_equals_that_of_diffusers(prediction_type):
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    schedule = linear_schedule(prediction_type=prediction_type)
    x = torch.randn(1, 4, 2, 8, 8, generator=seeded_generator(0))
    timesteps = lcm_timesteps(4)
    for i, t in enumerate(timesteps):
        output = torch.randn(x.shape, generator=seeded_generator(10 + i))
        expected = scheduler.step(output, t, x, generator=seeded_generator(20 + i)).prev_sample
        noise = torch.randn(x.shape, generator=seeded_generator(20 + i))
        ours = lcm_step(schedule, x, output, t, timesteps[i + 1] if i < 3 else None, noise)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        x = expected


def test_guidance_one_is_the_conditional_half():
    u, c = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    assert torch.equal(guide(u, c, 1.0), c)
    assert guide(u, c, 2.0).tolist() == [5.0, 12.0]


def test_a_restored_generator_continues_the_stream():
    generator = seeded_generator(3)
    torch.randn(5, generator=generator)
    state = generator.get_state()
    expected = torch.randn(40, generator=generator)
    assert torch.equal(torch.randn(40, generator=restored_generator(state)), expected)
