import io
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from engines.animatediff.decode import Decode
from engines.animatediff.spec import AnimateDiffSpec
from engines.errors import GenerationFailed
from engines.pipeline import Pipeline
from engines.spec import Latents
from tests.engines.animatediff.media import keyframes

SPEC = AnimateDiffSpec(3, 4, 1.0, "a red ball", keyframes=keyframes(0, 8))


def test_every_chunk_size_gives_the_same_pixels(pipeline: Pipeline):
    latents = pipeline.latents(SPEC)
    whole = np.concatenate(list(Decode(replace(pipeline.decode.config, decode_chunk=16)).frames(latents)))
    assert whole.shape == (16, 64, 64, 3)
    for chunk in (1, 3):
        chunked = np.concatenate(list(Decode(replace(pipeline.decode.config, decode_chunk=chunk)).frames(latents)))
        assert np.abs(chunked.astype(int) - whole).max() <= 1  # one level, where rounding differs


def test_latents_that_are_not_finite_are_an_error(pipeline: Pipeline):
    with pytest.raises(GenerationFailed):
        pipeline.decode.decode(Latents(torch.full((1, 4, 2, 8, 8), torch.inf), 0))


def test_where_half_precision_overflows_fp32_decodes_again(pipeline: Pipeline, caplog: pytest.LogCaptureFixture):
    half = Decode(replace(pipeline.decode.config, dtype="float16"))
    latents = Latents(torch.randn((1, 4, 3, 8, 8), generator=torch.Generator().manual_seed(1)), 0)
    plain = np.concatenate(list(half.frames(latents)))
    assert not caplog.records
    # features beyond 65504 before a norm: they overflow in fp16 and are harmless in fp32
    half.vae.decoder.conv_in.weight.mul_(30000)
    again = np.concatenate(list(half.frames(latents)))
    assert [record.message for record in caplog.records] == ["decoding again in fp32"]
    assert again.shape == plain.shape
    assert again.std() > 1


def test_a_batch_that_does_not_fit_into_memory_is_decoded_frame_by_frame(pipeline: Pipeline):
    latents = pipeline.latents(SPEC)
    expected = np.concatenate(list(pipeline.decode.frames(latents))).astype(int)

    def refuse(_: object, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError

    hook = pipeline.decode.vae.decoder.register_forward_pre_hook(refuse)
    ours = np.concatenate(list(pipeline.decode.frames(latents)))
    hook.remove()
    assert np.abs(ours - expected).max() <= 1


def test_a_rendered_clip_is_a_playable_video_and_the_same_bytes_again(pipeline: Pipeline):
    steps: list[int] = []
    clip = pipeline.render(SPEC, on_step=lambda checkpoint: steps.append(checkpoint.step))
    assert steps == [1, 2, 3, 4]
    assert (clip.num_frames, clip.height, clip.width, clip.fps, clip.seed) == (16, 64, 64, 8, 3)
    with av.open(io.BytesIO(clip.mp4)) as container:
        assert len(list(container.decode(video=0))) == 16
    assert pipeline.render(SPEC).mp4 == clip.mp4
