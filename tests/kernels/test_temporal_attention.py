from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import reference
from kernels.choice import plugins
from kernels.temporal_attention import temporal_attention
from tests.kernels.offline import SHARED_BYTES, TARGETS, Needs, needs

CASES = [  # clips, frames, positions, heads, head dim; tiles hold 4 positions up to 16 frames, 2 above
    (2, 1, 7, 2, 8),
    (1, 5, 11, 1, 16),
    (1, 14, 13, 1, 64),
    (2, 16, 7, 2, 40),
    (1, 16, 9, 1, 80),
    (3, 24, 1, 3, 40),
    (1, 24, 7, 1, 160),
    (2, 25, 7, 2, 64),
    (3, 32, 1, 1, 160),
    (1, 32, 3, 2, 80),
]
HALVES = [(2, 16, 7, 2, 40), (1, 25, 3, 2, 64), (1, 24, 3, 1, 160)]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A fused projection and a table of positions."""
    clips, frames, positions, heads, head_dim = case
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(clips * frames, positions, 3 * heads * head_dim, generator=generator)
    return qkv.to(dtype), torch.randn(32, 3 * heads * head_dim, generator=generator).to(dtype)


def kernel_error(case: tuple[int, ...], dtype: torch.dtype, with_table: bool, form: str) -> float:
    """In the interpreter's process: the largest difference from the reference in fp64, relative to the largest value."""
    from kernels.triton.temporal_attention import launch, tiles

    _, frames, _, heads, _ = case
    qkv, table = inputs(case, dtype)
    if form == "slice":  # part of a wider projection, so rows are not adjacent
        qkv = torch.cat([qkv, qkv.flip(0)], dim=2)[..., : qkv.shape[2]]
    elif form == "positions first":
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    elif form == "channels first":
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    summed = qkv + table[:frames].repeat(len(qkv) // frames, 1)[:, None] if with_table else qkv
    expected = reference.temporal_attention(summed.double(), frames, heads)
    ours = [
        launch(qkv, frames, heads, table if with_table else None, tile)
        for tile in {*tiles(8, 80), *tiles(8, 90), *tiles(40, 90)}
        if tile.warps == 4
    ]  # tiles with different rows; warps make no difference in the interpreter
    assert all(x.dtype == dtype and x.is_contiguous() and x.shape == expected.shape for x in ours)
    return max(((x.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item() for x in ours)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(interpreted: Executor, case: tuple[int, ...]):
    error = interpreted.submit(kernel_error, case, torch.float32, False, "fused").result()
    assert error <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", HALVES)
def test_kernel_equals_the_reference_in_half_precision(interpreted: Executor, case: tuple[int, ...], dtype: torch.dtype):
    assert interpreted.submit(kernel_error, case, dtype, False, "fused").result() <= TOLERANCES[dtype]


@pytest.mark.parametrize("form", ["slice", "positions first", "channels first"])
def test_kernel_reads_projections_of_any_strides(interpreted: Executor, form: str):
    assert interpreted.submit(kernel_error, (2, 14, 5, 2, 40), torch.float32, False, form).result() <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernel_adds_the_table_of_positions_as_a_sum_before_it_would(interpreted: Executor, dtype: torch.dtype):
    assert interpreted.submit(kernel_error, (2, 14, 5, 2, 40), dtype, True, "fused").result() <= TOLERANCES[dtype]


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operation_is_well_formed(dtype: torch.dtype, with_table: bool):
    qkv, table = inputs((2, 5, 3, 2, 8), dtype)
    operation: Any = torch.ops.reelray.temporal_attention.default
    torch.library.opcheck(operation, (qkv, 5, 2, table if with_table else None))


def test_a_frame_sees_its_own_positions_frames_and_no_others():
    qkv, _ = inputs((2, 4, 3, 1, 8), torch.float64)
    changed = qkv.clone()
    changed[5, 1] += 1  # second clip, second frame, second position
    differs = (temporal_attention(changed, 4, 1) != temporal_attention(qkv, 4, 1)).any(dim=2)  # (B F, S)
    expected = torch.zeros(8, 3, dtype=torch.bool)
    expected[4:, 1] = True
    assert torch.equal(differs, expected)


class Motion(nn.Module):
    def forward(self, qkv: Tensor) -> Tensor:
        return temporal_attention(qkv, 5, 2)


def exported() -> list[Any]:
    program = torch.export.export(Motion(), (inputs((2, 5, 3, 2, 8), torch.float32)[0],))
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_exports_as_pytorchs_own_attention():
    assert exported().count(torch.ops.aten.scaled_dot_product_attention.default) == 1


def test_exports_as_one_node_for_a_plugin():
    with plugins(["temporal_attention"]):
        assert exported() == [torch.ops.reelray.temporal_attention.default]


@pytest.mark.parametrize(
    ("shape", "frames", "table"),
    [((66, 3, 48), 0, None), ((7, 3, 48), 2, None), ((4, 3, 40), 2, None), ((4, 3, 48), 2, (1, 48)), ((4, 3, 48), 2, (2, 24))],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], frames: int, table: tuple[int, int] | None):
    with pytest.raises(ValueError, match=r"\d"):
        temporal_attention(torch.zeros(shape), frames, 2, None if table is None else torch.zeros(table))


SITES = [(40, 16, True), (64, 24, False), (80, 16, True), (160, 16, True)]  # head dim, frames, whether there is a table


def compiled(head_dim: int, frames: int, with_table: bool, capability: int, number: int) -> Needs:
    """The kernel with one of the capability's tiles."""
    from kernels.triton.temporal_attention import constants, kernel, tiles

    types = (
        {"qkv": "*fp16", "position": "*fp16"}
        | dict.fromkeys(("positions", "frame_stride", "token_stride"), "i32")
        | {"out": "*fp16"}
    )
    assert kernel.arg_names[: len(types)] == list(types)  # inputs, whole numbers, outputs: TensorRT's order
    tile = tiles(head_dim, capability)[number]
    given = constants(frames, 8, head_dim, tile)
    if not with_table:
        given["position"] = types.pop("position") and None
    return needs(kernel, types, given, capability, num_warps=tile.warps, num_stages=1)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("site", SITES)
def test_every_tile_offered_fits_its_gpu(site: tuple[int, int, bool], capability: int):
    for number in range(2 if capability in (90, 100) else 1):
        used = compiled(*site, capability, number)
        assert used.spills == 0
        assert used.registers <= 255
        assert used.shared <= SHARED_BYTES[capability] // 3  # memory-bound: several blocks must run at once
        assert used.uses_matrix_units
        warpgroups = used.count("HGMMA") > 0
        assert warpgroups == (capability == 90 and site[0] == 64), "heads that need two tiles gave wrong results with warpgroups"
        assert used.count("LDG.E.128")  # 16 bytes at once
