"""The grammar's scenes, their frames, and the judge that reads them back."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.demo.animatediff.draw import clip, images, scribbles
from engines.demo.animatediff.frame_table import SCALING, FrameTable, normalise
from engines.demo.animatediff.grammar import (
    ACROSS,
    ALONG,
    PLAIN,
    Scene,
    all_scenes,
    held_out,
    loose,
    read,
    training_scenes,
    words,
)
from engines.demo.animatediff.judge import as_frames, judge, overlap, shape_mask, true_mask
from engines.demo.animatediff.tokenizer import write_tokenizer
from engines.media.video import encode_h264
from engines.media.video_reader import open_video

KINDS = ("background", "colour", "motion", "shape")


def test_24_of_216_captions_are_held_out_and_every_word_is_among_them():
    scenes, kept = all_scenes(), held_out()
    assert len({scene.caption for scene in scenes}) == 216
    assert len(kept) == 24
    assert set(training_scenes()) == set(scenes) - set(kept)
    for kind in KINDS:
        counts = Counter(getattr(scene, kind) for scene in kept)
        assert set(counts) == {getattr(scene, kind) for scene in scenes}
        assert min(counts.values()) >= 4


def test_a_prompt_draws_what_it_says_and_the_plain_scene_otherwise():
    for scene in held_out():
        assert read(scene.caption) == scene
    assert read("a drone over the city at night") == PLAIN
    assert read("RED, square!") == Scene("square", "red")
    dice = random.Random(0)
    for scene in all_scenes():
        prompt, drawn = loose(scene, dice)
        assert read(prompt) == drawn


def test_a_word_is_one_token(tmp_path: Path):
    from transformers import CLIPTokenizer

    assert write_tokenizer(tmp_path, words()) < 600
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for scene in all_scenes():
        assert len(tokenizer(scene.caption).input_ids) == 9  # seven words, start and end
    assert len(tokenizer("a ball").input_ids) == 7


def test_the_judge_is_right_on_true_clips_also_after_h264(tmp_path: Path):
    dice = random.Random(0)
    right: Counter[str] = Counter()
    scenes = [replace(s, along=dice.choice(ALONG), across=dice.choice(ACROSS)) for s in dice.sample(all_scenes(), 24)]
    for i, scene in enumerate(scenes):
        frames = as_frames(clip(scene))
        if i % 2:
            path = tmp_path / "clip.mp4"
            path.write_bytes(encode_h264([frames], 64, 64, 8)[0])
            with open_video(path, 10**6, 60) as video:
                frames = np.stack(list(video.frames(1, 16)))
        right.update(kind for kind, good in judge(frames).right(scene).items() if good)
    assert right == dict.fromkeys(KINDS, len(scenes))  # its own error is below 1 in 24


def test_the_judge_is_not_fooled():
    still = np.repeat(as_frames(clip(replace(PLAIN, motion=None)))[:1], 16, axis=0)
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    assert judge(still).motion is None
    assert judge(noise).motion is None
    assert judge(noise).colour is None
    assert judge(np.full_like(noise, 10)).shape is None
    other = judge(as_frames(clip(Scene("circle", "red", "left", "blue"))))
    assert other.right(Scene("square", "pink", "up", "grey")) == dict.fromkeys(KINDS, False)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_a_mask_covers_its_shape_and_its_scribble_surrounds_it(shape: str):
    scene = Scene(shape, "yellow", None, "blue")
    mask = shape_mask(as_frames(images([scene], [(30.0, 35.0)]))[0])
    assert overlap(mask, true_mask(scene, (30.0, 35.0))) > 0.9
    assert overlap(mask, true_mask(scene, (30.0, 49.0))) < 0.25
    outline = np.asarray(scribbles([scene], [(30.0, 35.0)], [2.0])[0, 0] > 0.5)
    assert 0.05 < (mask & outline).sum() / mask.sum() < 0.4
    assert abs(np.argwhere(outline).mean() - np.argwhere(mask).mean()) < 1


def test_the_latents_scale_is_folded_into_the_vae_exactly():
    from engines.demo.animatediff.autoencoder import new_vae

    torch.manual_seed(0)
    vae = new_vae().eval().requires_grad_(False)
    picture = torch.rand(2, 3, 64, 64)
    before, shown = vae.encode(picture).latent_dist, vae(picture, sample_posterior=False).sample
    values = torch.randn(3, 4, 4, 8, 8) * torch.tensor([0.5, 1, 2, 3])[:, None, None] + 2
    table = normalise(vae, FrameTable(values))
    after = vae.encode(picture).latent_dist
    std, mean = torch.std_mean(values, dim=(0, 1, 3, 4))
    torch.testing.assert_close(table.values.mean(dim=(0, 1, 3, 4)), torch.zeros(4), atol=1e-5, rtol=0)
    want = (before.mean * SCALING - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(after.mean * SCALING, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.std * SCALING, before.std * SCALING / std[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae(picture, sample_posterior=False).sample, shown, atol=1e-4, rtol=1e-4)
