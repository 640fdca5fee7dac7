"""Which frames are decoded together and which again, with a fake VAE whose every pixel is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.diffusion.frame_decoder import FrameDecoder
from engines.errors import GenerationFailed


class FakeVAE(nn.Module):
    """Pixels are the latents' first three channels plus their mean over a chunk, so that frames of a chunk affect each other.

    Values above `overflow` become infinite in half precision. calls: (dtype, frames) of each call.
    """

    config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(8, 8, 8, 8))

    def __init__(self, dtype: torch.dtype, overflow: float = 10.0, memory_frames: int = 1000):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype), requires_grad=False)
        self.overflow, self.memory_frames = overflow, memory_frames
        self.calls: list[tuple[torch.dtype, int]] = []

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device


def call(vae: Any, latents: Tensor, in_chunk: int) -> Tensor:
    vae.calls.append((latents.dtype, len(latents)))
    if len(latents) > vae.memory_frames:
        raise torch.OutOfMemoryError
    assert latents.dtype == vae.dtype
    half = latents.dtype != torch.float32
    pixels = torch.where((latents.abs() > vae.overflow) & half, torch.inf, latents)[:, :3] / 40
    chunks = pixels.unflatten(0, (-1, in_chunk))  # a call contains whole chunks only
    return (chunks + chunks.mean(1, keepdim=True)).flatten(0, 1)


def latents(frames: int, large: tuple[int, ...] = ()) -> Tensor:
    """(1, 4, F, 2, 2), exact in every dtype. large: frames that overflow in half precision."""
    values = torch.arange(frames).float()[:, None, None, None].expand(frames, 4, 2, 2) / 4
    values = values + torch.tensor([16.0 if i in large else 0.0 for i in range(frames)])[:, None, None, None]
    return values.transpose(0, 1)[None]


def decoded(vae: FakeVAE, values: Tensor, chunk: int, batch_frames: int = 100) -> Any:
    return np.concatenate(list(FrameDecoder(vae, call, batch_frames).frames(values, chunk)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 2])
def test_only_the_chunk_that_overflowed_is_decoded_again_in_fp32(
    dtype: torch.dtype, chunk: int, caplog: pytest.LogCaptureFixture
):
    vae = FakeVAE(dtype)
    decoder = FrameDecoder(vae, call, 100)
    precise = decoder._precise_vae
    pixels = np.concatenate(list(decoder.frames(latents(6, large=(3,)), chunk)))
    assert (vae.calls, precise.calls) == ([(dtype, 6)], [(torch.float32, chunk)])
    (record,) = caplog.records
    assert (vars(record)["chunks"], vars(record)["of"]) == (1, 6 // chunk)
    untouched = [i for i in range(6) if i // chunk != 3 // chunk]
    assert np.array_equal(pixels[untouched], decoded(FakeVAE(dtype), latents(6), chunk)[untouched])
    repeated = [i for i in range(6) if i not in untouched]
    assert np.array_equal(pixels[repeated], decoded(FakeVAE(torch.float32), latents(6, large=(3,)), chunk)[repeated])


@pytest.mark.parametrize("batch_frames", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("memory_frames", [2, 1000])
def test_neither_the_size_of_a_batch_nor_the_memory_changes_a_pixel(batch_frames: int, memory_frames: int):
    values = latents(7, large=(2, 6))
    expected = decoded(FakeVAE(torch.float16), values, chunk=2)
    assert np.array_equal(decoded(FakeVAE(torch.float16, memory_frames=memory_frames), values, 2, batch_frames), expected)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_batch_without_memory_is_decoded_chunk_by_chunk(chunk: int, caplog: pytest.LogCaptureFixture):
    vae = FakeVAE(torch.float32, memory_frames=chunk)
    decoded(vae, latents(4), chunk)
    assert vae.calls == [(torch.float32, 4), *[(torch.float32, chunk)] * (4 // chunk)]
    assert [record.message for record in caplog.records] == ["decoding chunk by chunk"]


def test_a_batch_that_did_not_fit_is_not_tried_again(caplog: pytest.LogCaptureFixture):
    vae = FakeVAE(torch.float32, memory_frames=2)
    decoded(vae, latents(8), chunk=2, batch_frames=4)
    assert vae.calls == [(torch.float32, 4), *[(torch.float32, 2)] * 4]
    assert len(caplog.records) == 1


def test_a_chunk_without_memory_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        decoded(FakeVAE(torch.float32, memory_frames=1), latents(4), chunk=2)


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float16, 2), (torch.float32, 1)])
def test_what_fp32_cannot_decode_is_an_error(dtype: torch.dtype, calls: int):
    vae = FakeVAE(dtype)
    decoder = FrameDecoder(vae, call, 100)
    precise = decoder._precise_vae
    with pytest.raises(GenerationFailed):
        list(decoder.frames(torch.full((1, 4, 2, 2, 2), torch.nan)))
    assert len(vae.calls) + len(precise.calls) == calls
