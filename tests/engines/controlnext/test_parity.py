"""Our sampler against the slow reference, on the same weights and noise: final latents within 1e-4 in fp32."""

from typing import Any

import pytest
import torch

from engines.controlnext.config import ControlNeXtWeights
from engines.controlnext.denoise import Denoise
from engines.sampling import karras_sigmas
from tests.engines.controlnext import reference
from tests.engines.controlnext.conftest import conditioning, first_noise, reference_nets


def direct(nets: tuple[Any, Any], asked: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    num_frames = len(asked.poses)
    return reference.sample(
        *nets,
        asked.poses,
        asked.image_latent,
        asked.image_embedding,
        first_noise(num_frames),
        steps=asked.num_inference_steps,
        guidance=asked.guidance_scale,
        batch_frames=asked.batch_frames,
        overlap=asked.overlap,
        ids=asked.added_ids,
        cond_scale=asked.controlnext_cond_scale,
        dtype=dtype,
    ).transpose(1, 2)


@pytest.fixture(scope="module")
def nets(controlnext_weights: ControlNeXtWeights) -> tuple[Any, Any]:
    return reference_nets(controlnext_weights)


@pytest.fixture(scope="module")
def precise_nets(controlnext_weights: ControlNeXtWeights) -> tuple[Any, Any]:
    return reference_nets(controlnext_weights, "float64")


@pytest.mark.parametrize(
    ("num_frames", "overlap", "guidance"),
    [  # one window has no overlap; of several, each overlap has the ragged and the even end, with and without guidance
        (4, 2, 3.0),
        (6, 3, 1.0),
        (10, 2, 1.0),
        (10, 3, 3.0),
        (11, 2, 3.0),
        (11, 3, 1.0),
    ],
)
def test_final_latents_equal_the_direct_samplers(
    denoise: Denoise, nets: tuple[Any, Any], num_frames: int, overlap: int, guidance: float
):
    asked = conditioning(num_frames, overlap=overlap, guidance_scale=guidance)
    ours = denoise.sample(asked)
    expected = direct(nets, asked)
    assert ours.values.shape == expected.shape == (1, 4, num_frames, 8, 6)
    assert expected.std() > 0.1
    assert (ours.values - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def plain(denoise: Denoise) -> torch.Tensor:
    """Latents at the control scale and with the ids of `conditioning`."""
    return denoise.sample(conditioning(4)).values


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_the_control_scale_does_what_it_says(denoise: Denoise, nets: tuple[Any, Any], plain: torch.Tensor, scale: float):
    asked = conditioning(4, controlnext_cond_scale=scale)
    ours = denoise.sample(asked).values
    assert (ours - direct(nets, asked)).abs().max() <= 1e-4
    assert (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("ids", [(6.0, 128.0, 0.02), (59.0, 0.5, 0.02)])
def test_the_ids_reach_the_model(denoise: Denoise, nets: tuple[Any, Any], plain: torch.Tensor, ids: tuple[float, float, float]):
    asked = conditioning(4, added_ids=ids)
    ours = denoise.sample(asked).values
    assert (ours - direct(nets, asked)).abs().max() <= 1e-4
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_any_number_of_steps(denoise: Denoise, precise_nets: tuple[Any, Any], steps: int):
    # against float64, as the reference's formula for a step loses up to 1e-4 between 700 and 0
    asked = conditioning(3, num_inference_steps=steps)
    assert (denoise.sample(asked).values - direct(precise_nets, asked, torch.float64)).abs().max() <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_in_float64_all_savings_together_are_rounding(precise: Denoise, precise_nets: tuple[Any, Any], guidance: float):
    asked = conditioning(7, guidance_scale=guidance, num_inference_steps=2)
    assert (precise.sample(asked).values - direct(precise_nets, asked, torch.float64)).abs().max() <= 1e-9


def test_the_sigmas_are_the_references():
    ours = karras_sigmas(25, 0.002, 700.0)
    for value, listed in zip(ours, reference.SIGMAS_25, strict=True):
        assert value == pytest.approx(listed, rel=3e-3)
    assert ours == pytest.approx(reference.sigmas(25).tolist(), rel=1e-12)
    assert karras_sigmas(1, 0.002, 700.0) == pytest.approx((700.0, 0.0))
    with pytest.raises(ValueError, match="at least one step"):
        karras_sigmas(0, 0.002, 700.0)
