from concurrent.futures import Executor
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from kernels import reference
from kernels.choice import forced
from kernels.group_norm_silu import group_norm_silu
from kernels.triton import group_norm_silu as group_norm_silu_triton
from kernels.triton.group_norm_silu import APPLY, MOMENTS, PARTIALS, apply_affine, channel_affine, chunk_moments
from kernels.triton.tile import Tile, next_power_of_2
from tests.kernels.fusions import HALVES, TOLERANCES, assert_streams, error, values
from tests.kernels.offline import TARGETS

CASES = [  # shape (B F, C, H, W), groups, F
    ((1, 90, 1, 1), 3, 1),
    ((1, 320, 9, 7), 32, 1),
    ((2, 96, 5, 13), 4, 1),
    ((5, 90, 11, 3), 3, 5),
    ((28, 96, 3, 7), 8, 14),
    ((2, 64, 23, 29), 2, 1),  # more than a chunk
]
CUTS = [*((moments, APPLY[0]) for moments in MOMENTS), *((MOMENTS[0], apply) for apply in APPLY[1:])]
GROUP_WIDTHS = (10, 80)  # the narrowest and the widest group of the UNets


def inputs(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    x = values(*shape, dtype=dtype, offset=offset).contiguous(memory_format=torch.channels_last)
    return x, values(shape[1], dtype=dtype, seed=1), values(shape[1], dtype=dtype, seed=2)


def interpreter_error(
    shape: tuple[int, ...],
    groups: int,
    frames: int,
    silu: bool,
    dtype: torch.dtype,
    cut: tuple[Tile, Tile],
    offset: float = 0.5,
    added: Tensor | None = None,
) -> float:
    x, weight, bias = inputs(shape, dtype, offset)
    ours = group_norm_silu_triton.launch(x, weight, bias, groups, 1e-5, frames, silu, *cut, added=added)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    wide = x.double(), weight.double(), bias.double()
    wide_added = None if added is None else added.double()
    return error(ours, reference.group_norm_silu(*wide, groups, 1e-5, num_frames=frames, silu=silu, added=wide_added))


@pytest.mark.parametrize(("shape", "groups", "frames"), CASES)
def test_the_kernels_equal_the_reference(interpreted: Executor, shape: tuple[int, ...], groups: int, frames: int):
    assert interpreted.submit(interpreter_error, shape, groups, frames, True, torch.float32, CUTS[0]).result() <= 2e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "groups", "frames"), CASES[2:4])
def test_the_kernels_equal_the_reference_in_half_precision(
    interpreted: Executor, shape: tuple[int, ...], groups: int, frames: int, dtype: torch.dtype
):
    assert interpreted.submit(interpreter_error, shape, groups, frames, True, dtype, CUTS[0]).result() <= TOLERANCES[dtype]


@pytest.mark.parametrize("cut", CUTS[1:])
def test_every_tile_gives_the_same(interpreted: Executor, cut: tuple[Tile, Tile]):
    assert interpreted.submit(interpreter_error, (10, 90, 11, 3), 3, 5, True, torch.float32, cut).result() <= 2e-5


@pytest.mark.parametrize(("shape", "groups", "frames"), [((5, 90, 11, 3), 3, 5), ((2, 64, 23, 29), 2, 1)])
def test_what_is_added_to_channels_before_moves_their_means(
    interpreted: Executor, shape: tuple[int, ...], groups: int, frames: int
):
    added = values(shape[1], dtype=torch.float32, seed=3, offset=2.0)
    given = (shape, groups, frames, True, torch.float32, CUTS[0], 0.5, added)
    assert interpreted.submit(interpreter_error, *given).result() <= 2e-5


@pytest.mark.parametrize("back_end", ["kernels", "pytorch"])
def test_the_operation_adds_before_it_norms(back_end: Literal["kernels", "pytorch"]):
    x, weight, bias = inputs((4, 96, 5, 13), torch.float64)
    added = values(96, dtype=torch.float64, seed=3, offset=2.0)
    with forced(back_end):
        assert (
            error(
                group_norm_silu(x, weight, bias, 8, num_frames=2, added=added),
                reference.group_norm_silu(x + added[:, None, None], weight, bias, 8, 1e-5, num_frames=2),
            )
            < 1e-13
        )


def test_silu_can_be_left_out(interpreted: Executor):
    assert interpreted.submit(interpreter_error, (5, 90, 11, 3), 3, 5, False, torch.float32, CUTS[0]).result() <= 2e-5


def test_more_chunks_than_are_taken_at_a_time(interpreted: Executor):
    narrow = Tile(2, 64, 4)  # 8 chunks of 128 channels are taken at a time
    assert interpreted.submit(interpreter_error, (1, 90, 7, 5), 1, 1, False, torch.float32, (narrow, APPLY[0])).result() <= 2e-5


def test_a_large_mean_costs_the_kernels_no_variance(interpreted: Executor):
    """Computed from sums of squares the variance would be lost: fp32 holds 1e6 only to 0.06."""
    assert interpreted.submit(interpreter_error, (1, 64, 23, 29), 2, 1, False, torch.float32, CUTS[0], 1000.0).result() <= 2e-4


def same_bits_alone_and_in_company() -> bool:
    x, weight, bias = inputs((3, 90, 11, 3), torch.float32)
    together = group_norm_silu_triton.launch(x, weight, bias, 3, 1e-5, 1, True)
    alone = [group_norm_silu_triton.launch(x[i : i + 1], weight, bias, 3, 1e-5, 1, True) for i in range(3)]
    return torch.equal(together, torch.cat(alone))


def test_an_image_has_the_same_bits_alone_and_in_a_batch(interpreted: Executor):
    assert interpreted.submit(same_bits_alone_and_in_company).result()


@pytest.mark.parametrize("silu", [False, True])
def test_the_reference_is_torchs_group_norm(silu: bool):
    x, weight, bias = inputs((2, 96, 5, 13), torch.float64)
    norm = nn.GroupNorm(32, 96, eps=1e-6).double()
    norm.load_state_dict({"weight": weight, "bias": bias})
    expected = F.silu(norm(x)) if silu else norm(x)
    assert error(reference.group_norm_silu(x, weight, bias, 32, 1e-6, silu=silu), expected) < 1e-13


def test_frames_share_statistics_as_in_the_temporal_layers():
    x, weight, bias = inputs((10, 96, 5, 3), torch.float64)
    clip = x.unflatten(0, (2, 5)).transpose(1, 2)  # (B, C, F, H, W)
    expected = F.group_norm(clip, 32, weight, bias, 1e-5).transpose(1, 2).flatten(0, 1)
    assert error(reference.group_norm_silu(x, weight, bias, 32, 1e-5, num_frames=5, silu=False), expected) < 1e-13


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_without_a_gpu_the_operation_is_the_reference_in_channels_last(dtype: torch.dtype):
    x, weight, bias = inputs((10, 96, 5, 3), dtype)
    with forced("kernels"):
        ours = group_norm_silu(x.contiguous(), weight, bias, 32, num_frames=5)
    assert torch.equal(ours, reference.group_norm_silu(x.contiguous(), weight, bias, 32, 1e-5, num_frames=5))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_where_nothing_was_measured_pytorch_computes_the_same(dtype: torch.dtype, frames: int, silu: bool):
    x, weight, bias = inputs((10, 96, 5, 3), dtype)
    expected = reference.group_norm_silu(x.double(), weight.double(), bias.double(), 32, 1e-5, num_frames=frames, silu=silu)
    for images in (x, x.contiguous()):
        ours = group_norm_silu(images, weight, bias, 32, num_frames=frames, silu=silu)
        assert error(ours, expected) <= TOLERANCES.get(dtype, 1e-13)


@pytest.mark.parametrize("frames", [1, 2])
def test_the_operation_is_registered_soundly(frames: int):
    x, weight, bias = inputs((2, 8, 3, 5), torch.float32)
    for added in (None, bias):
        torch.library.opcheck(torch.ops.reelray.group_norm_silu, (x, weight, bias, 4, 1e-5, frames, True, added))


def test_a_broken_clip_and_uneven_groups_are_refused():
    x, weight, bias = inputs((3, 8, 3, 5), torch.float32)
    with pytest.raises(AssertionError):
        group_norm_silu(x, weight, bias, 4, num_frames=2)
    with pytest.raises(AssertionError):
        group_norm_silu(x, weight, bias, 3)


SIZES = dict.fromkeys(("rows", "channels"), "i32")


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("tile", MOMENTS)
def test_every_tile_of_the_moments_fits_every_card(tile: Tile, capability: int):
    types = {"x": "*fp16", **SIZES, "chunks": "i32", "means": "*fp32", "squares": "*fp32"}
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "REPEATS": tile.repeats}
    assert_streams(chunk_moments, types, constants, capability, tile.warps)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("tile", APPLY)
def test_every_tile_of_the_application_fits_every_card(tile: Tile, capability: int):
    types = {"x": "*fp16", "scale": "*fp32", "shift": "*fp32", **SIZES, "out": "*fp16"}
    constants = {"SILU": True, "ROWS": tile.rows, "COLUMNS": tile.columns}
    assert_streams(apply_affine, types, constants, capability, tile.warps)


def test_an_image_of_one_chunk_fits_too():
    """Triton treats integer arguments of value 1 as constants."""
    types = {"x": "*fp16", **SIZES, "means": "*fp32", "squares": "*fp32"}
    constants = {"chunks": 1, "ROWS": MOMENTS[0].rows, "COLUMNS": MOMENTS[0].columns, "REPEATS": MOMENTS[0].repeats}
    assert_streams(chunk_moments, types, constants, 90, MOMENTS[0].warps)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("width", [next_power_of_2(width) for width in GROUP_WIDTHS])
def test_every_width_of_a_group_fits_every_card(width: int, capability: int):
    types = {"means": "*fp32", "squares": "*fp32", "weight": "*fp16", "bias": "*fp16", "added": "*fp16", **SIZES}
    types |= {"chunks": "i32", "groups": "i32", "scale": "*fp32", "shift": "*fp32"}
    constants = {"EPS": 1e-5, "CHUNK_ROWS": 512, "CHUNKS": PARTIALS // width, "WIDTH": width}
    assert_streams(channel_affine, types, constants, capability, 4, wide=False)
