from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageOps

from engines.animatediff.spec import AnimateDiffSpec, Keyframe
from engines.errors import ImageLoadError, ImageTooLarge, UnsupportedImageFormat
from engines.pipeline import Pipeline
from tests.engines.animatediff.media import keyframes, png, scribble

SPEC = AnimateDiffSpec(3, 4, 1.0, "a red ball", keyframes=keyframes(0, 8))


def test_keyframes_in_another_order_are_the_same_request(pipeline: Pipeline):
    spec = replace(SPEC, controlnet_type="rgb")
    one = pipeline.preprocess.encode(spec)
    other = pipeline.preprocess.encode(replace(spec, keyframes=spec.keyframes[::-1]))
    assert one.control.frames == (0, 8)
    assert one.control.key == other.control.key
    assert torch.equal(one.control.values, other.control.values)


def test_the_rgb_draw_follows_the_seed_and_not_the_global_generator(pipeline: Pipeline):
    spec = replace(SPEC, controlnet_type="rgb")
    values = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        values.append(pipeline.preprocess.encode(spec).control.values)
    assert torch.equal(*values)
    assert not torch.equal(values[0], pipeline.preprocess.encode(replace(spec, seed=4)).control.values)


def test_a_scribble_draws_nothing(pipeline: Pipeline):
    state = pipeline.preprocess.encode(SPEC).rng_state
    assert torch.equal(state, torch.Generator().manual_seed(3).get_state())


def test_a_long_prompt_is_cut_with_a_note(pipeline: Pipeline):
    conditioning = pipeline.preprocess.encode(replace(SPEC, prompt="ball" * 30))
    assert conditioning.text.shape == (1, 77, 32)
    assert conditioning.notes == ("prompt cut to its first 75 of 120 tokens",)
    assert pipeline.preprocess.encode(SPEC).notes == ()


def test_a_scribble_that_is_mostly_bright_is_noted_and_used_as_it_is(pipeline: Pipeline):
    dark_on_white = Keyframe(4, png(ImageOps.invert(scribble())), "keyframe_1_image_url")
    spec = replace(SPEC, keyframes=(*keyframes(0), dark_on_white))
    given = pipeline.preprocess.encode(spec)
    (note,) = given.notes
    assert note.startswith("keyframe_1_image_url is mostly bright")
    assert given.control.values[1].mean() > 0.5
    assert pipeline.preprocess.encode(replace(spec, controlnet_type="rgb")).notes == (), "a picture may be bright"


def test_only_a_scribbles_transparency_is_its_ground(pipeline: Pipeline):
    image = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    image.paste((0, 0, 0, 255), (24, 0, 40, 64))
    spec = replace(SPEC, keyframes=(Keyframe(0, png(image), "keyframe_0_image_url"),))
    values = pipeline.preprocess.encode(spec).control.values[0]
    assert (values[:, :, 28:36].min(), values[:, :, :20].max()) == (1, 0)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    grey.paste((0, 0, 0), (24, 0, 40, 64))
    over_grey = replace(spec, controlnet_type="rgb", keyframes=(Keyframe(0, png(grey), "keyframe_0_image_url"),))
    shown, expected = (
        pipeline.preprocess.encode(asked).control.values for asked in (replace(spec, controlnet_type="rgb"), over_grey)
    )
    assert torch.equal(shown, expected)


def test_prompts_encoded_side_by_side_do_not_disturb_each_other(pipeline: Pipeline):
    specs = [
        replace(SPEC, prompt="ball" * n, negative_prompt="x" * (80 - n), guidance_scale=2.0, keyframes=()) for n in range(1, 41)
    ]
    alone = [pipeline.preprocess.encode(spec) for spec in specs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for one, other in zip(alone, pool.map(pipeline.preprocess.encode, specs), strict=True):
                assert one.text.shape == (2, 77, 32)
                assert torch.equal(one.text, other.text)
                assert one.notes == other.notes


@pytest.mark.parametrize("prompt", ["", "a", "a" * 75, "a" * 76, "a" * 77, "a red ball é 火"])
def test_prompts_are_cut_and_padded_as_the_tokenizer_itself_does(pipeline: Pipeline, prompt: str):
    stage = pipeline.preprocess
    ids = stage.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    stage.tokenizer.backend_tokenizer.no_truncation()
    stage.tokenizer.backend_tokenizer.no_padding()
    with torch.inference_mode():
        expected = stage.text_encoder(ids).last_hidden_state
    assert torch.equal(stage.encode(replace(SPEC, prompt=prompt, keyframes=())).text, expected)


def test_without_keyframes_there_is_no_control(pipeline: Pipeline):
    assert pipeline.preprocess.encode(replace(SPEC, keyframes=())).control is None


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"plain text", UnsupportedImageFormat),
        (png(scribble())[:200], ImageLoadError),
        (png(scribble(size=(9000, 6000))), ImageTooLarge),
    ],
)
def test_a_bad_keyframe_is_named(pipeline: Pipeline, data: bytes, error: type[Exception]):
    bad = Keyframe(5, data, "keyframe_2_image_url")
    with pytest.raises(error) as raised:
        pipeline.preprocess.encode(replace(SPEC, keyframes=(*SPEC.keyframes, bad)))
    assert raised.value.loc == ("body", "keyframe_2_image_url")
