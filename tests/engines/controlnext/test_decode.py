import ctypes
import io
from dataclasses import replace

import av
import numpy as np
import psutil
import pytest
import torch

from engines.controlnext.checkpoint import load_vae
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.decode import Decode
from engines.controlnext.spec import ControlNeXtLatents
from engines.errors import Cancelled, GenerationFailed
from engines.spec import Progress
from tests.engines.controlnext import reference
from tests.engines.controlnext.peak_memory import grey


@pytest.fixture(scope="module")
def decode(controlnext_weights: ControlNeXtWeights) -> Decode:
    return Decode(ControlNeXtConfig(weights=controlnext_weights, threads=1))


def latents(num_frames: int, chunk: int = 2, fps: int = 7) -> ControlNeXtLatents:
    values = torch.randn((1, 4, num_frames, 8, 6), generator=torch.Generator().manual_seed(1))
    return ControlNeXtLatents(values, 3, chunk, fps)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 32])
def test_chunks_are_decoded_as_the_reference_does(decode: Decode, chunk: int):
    asked = latents(7, chunk)
    vae = load_vae(decode.config, torch.float32)
    expected = reference.decode(vae, asked.values.transpose(1, 2), chunk).permute(0, 2, 3, 1).mul(255).round().numpy()
    ours = np.concatenate(list(decode.frames(asked)))
    assert ours.shape == (7, 64, 48, 3)
    assert np.abs(ours - expected).max() <= 1  # one level, where rounding differs


def test_another_chunk_size_gives_other_pixels(decode: Decode):
    one, other = (np.concatenate(list(decode.frames(latents(6, chunk)))).astype(int) for chunk in (2, 3))
    assert np.abs(one - other).max() > 5


@pytest.mark.parametrize("batch_frames", [1, 2, 5, 100])
def test_how_many_chunks_share_a_batch_changes_no_pixel(decode: Decode, batch_frames: int):
    """5i."""
    asked = latents(7)
    batched = Decode(replace(decode.config, decode_batch_frames=batch_frames))
    sizes: list[int] = []
    hook = batched.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ours = np.concatenate(list(batched.frames(asked))).astype(int)
    hook.remove()
    assert sizes == {1: [2, 2, 2, 1], 2: [2, 2, 2, 1], 5: [4, 2, 1], 100: [6, 1]}[batch_frames]
    assert np.abs(ours - np.concatenate(list(decode.frames(asked)))).max() <= 1


def test_the_file_has_the_frames_the_rate_and_the_size_that_were_asked_for(decode: Decode):
    told: list[Progress] = []
    clip = decode.decode(latents(11, fps=30), on_progress=told.append)
    assert (clip.num_frames, clip.height, clip.width, clip.fps, clip.seed) == (11, 64, 48, 30, 3)
    with av.open(io.BytesIO(clip.mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (30, 48, 64)
        assert len(list(container.decode(video=0))) == 11
    assert told == [Progress("frame", 8, 11), Progress("frame", 10, 11), Progress("frame", 11, 11)]
    assert decode.decode(latents(11, fps=30)).mp4 == clip.mp4


def test_a_stop_is_obeyed_within_one_call_of_the_vae(decode: Decode):
    calls: list[int] = []
    hook = decode.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Cancelled):
        decode.decode(latents(24), should_stop=lambda: len(calls) >= 2)
    hook.remove()
    assert len(calls) == 2


def test_latents_that_are_not_finite_are_an_error(decode: Decode):
    asked = latents(2)
    with pytest.raises(GenerationFailed):
        decode.decode(replace(asked, values=torch.full_like(asked.values, torch.inf)))


def test_where_half_precision_overflows_fp32_decodes_again(decode: Decode, caplog: pytest.LogCaptureFixture):
    half = Decode(replace(decode.config, dtype="float16"))
    asked = latents(4)
    asked = replace(asked, values=asked.values[..., :3, :2])  # a CPU is slow in fp16
    plain = np.concatenate(list(half.frames(asked)))
    assert not caplog.records
    # features beyond 65504 before a norm: they overflow in fp16 and are harmless in fp32
    half.vae.decoder.conv_in.weight.mul_(30000)
    again = np.concatenate(list(half.frames(asked)))
    assert [record.message for record in caplog.records] == ["decoding again in fp32"]
    assert again.shape == plain.shape
    assert again.std() > 1


def test_a_batch_that_does_not_fit_into_memory_is_decoded_chunk_by_chunk(decode: Decode):
    asked = latents(7)
    expected = np.concatenate(list(decode.frames(asked))).astype(int)

    def refuse(_: object, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    hook = decode.vae.decoder.register_forward_pre_hook(refuse)
    ours = np.concatenate(list(decode.frames(asked)))
    hook.remove()
    assert np.abs(ours - expected).max() <= 1


def memory_taken(decode: Decode, num_frames: int) -> int:
    """The most bytes beyond those before that decoding so many frames of 128x128 pixels holds."""
    memory = psutil.Process().memory_info
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but not given back would hide what is kept
    before, seen = memory().rss, list[int]()
    values = torch.randn((1, 4, num_frames, 16, 16), generator=torch.Generator().manual_seed(0))
    clip = decode.decode(ControlNeXtLatents(values, 0, 2, 30), on_progress=lambda _: seen.append(memory().rss))
    assert clip.num_frames == num_frames
    return max(seen) - before


def test_600_frames_take_no_more_memory_than_100(decode: Decode, monkeypatch: pytest.MonkeyPatch):
    """If the frames were kept, they would take 25 MB more. `make bench` measures the same with the VAE."""
    monkeypatch.setattr(decode.vae, "decode", grey)
    few = memory_taken(decode, 100)
    assert memory_taken(decode, 600) - few < 15e6
