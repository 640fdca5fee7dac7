"""Random puppets, and the judge that finds their joints and colours."""

import random

import numpy as np
import torch

from engines.controlnext.demo_pose import DRIVER, dance, joints_of
from engines.demo.animatediff.judge import as_frames
from engines.demo.controlnext.autoencoder import CHANNELS, new_vae, scale_latents
from engines.demo.controlnext.judge import PuppetJudge
from engines.demo.controlnext.nets import LATENT_SCALING
from engines.demo.controlnext.puppets import SIDE, pictures, pose_picture, random_moves, random_puppet, stances
from engines.demo.controlnext.tasks import SIGMA_RANGE, draw_sigmas, noised, unseen
from engines.sampling import euler_step


def test_a_puppet_stays_in_its_frame_and_stands_out_from_it():
    dice = random.Random(0)
    for _ in range(50):
        puppet, moves = random_puppet(dice), random_moves(dice)
        joints = np.stack(stances(puppet, moves, range(0, 40, 5)))
        assert joints.min() > 0
        assert joints.max() < SIDE
        assert not {puppet.shirt, puppet.trousers, puppet.skin} & {puppet.wall, puppet.ground}


def test_the_judge_measures_joints_and_colours_on_true_clips():
    judge = PuppetJudge()
    puppet, joints = unseen(1)
    frames = as_frames(pictures(puppet, joints[:4]))
    true = judge(frames, np.stack(joints[:4]), puppet)
    assert true.error < 0.003  # of the frame's height: its own error
    assert true.found == true.colours == 1
    other, elsewhere = unseen(2)
    wrong = judge(frames, np.stack(elsewhere[:4]), other)
    assert wrong.error > 0.03
    assert wrong.colours < 0.5


def test_a_pose_picture_shows_the_joints_that_are_there():
    joints = joints_of(DRIVER, dance(0.0), SIDE, SIDE)
    whole = pose_picture(joints)
    assert whole.shape == (SIDE, SIDE, 3)
    x, y = joints[9].round().astype(int)  # the left wrist
    assert whole[y - 3 : y + 4, x - 3 : x + 4].any()

    class Absent(random.Random):
        def random(self) -> float:
            return 0.0

    assert not pose_picture(joints, Absent()).any()


def test_v_is_what_the_sampler_takes():
    clean, noise, sigmas = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([700.0, 0.5])
    scaled, v = noised(clean, noise, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        x = scaled[i] * (sigma**2 + 1) ** 0.5
        torch.testing.assert_close(euler_step(x, v[i], sigma, 0.0), clean[i], atol=1e-3, rtol=1e-3)
    drawn = draw_sigmas(1000, torch.Generator().manual_seed(0))
    assert SIGMA_RANGE[0] <= drawn.min()
    assert drawn.max() <= SIGMA_RANGE[1]
    assert 0.3 < (drawn > 30).float().mean() < 0.5


def test_the_latents_scale_is_folded_into_the_temporal_vae_exactly():
    torch.manual_seed(0)
    vae = new_vae().eval().requires_grad_(False)
    picture = torch.rand(2, 3, 32, 32)
    before, shown = vae.encode(picture).latent_dist, vae(picture, num_frames=2, sample_posterior=False).sample
    latents = torch.randn(4, CHANNELS, 3, 3) * torch.linspace(0.5, 3, CHANNELS)[:, None, None]
    scaled = scale_latents(vae, latents)
    after = vae.encode(picture).latent_dist
    gain = (scaled / latents)[0, :, :1, :1]
    torch.testing.assert_close((scaled * LATENT_SCALING).std(dim=(0, 2, 3)), torch.ones(CHANNELS))
    torch.testing.assert_close(after.mean, before.mean * gain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std, before.std * gain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae(picture, num_frames=2, sample_posterior=False).sample, shown, atol=1e-4, rtol=1e-4)
