from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention
from tests.kernels.offline import SHARED_BYTES, TARGETS, Needs, needs

CASES = [  # batch, queries, keys, heads, head dim
    (2, 1, 1, 2, 8),
    (1, 65, 77, 2, 40),
    (2, 7, 77, 1, 80),
    (1, 63, 65, 1, 160),
    (1, 130, 128, 1, 64),
    (1, 64, 64, 2, 16),
    (1, 33, 257, 1, 40),
    (3, 5, 1, 2, 64),
]
HALVES = [(1, 65, 77, 2, 40), (1, 33, 130, 1, 80), (1, 17, 64, 1, 160)]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, head_dim = case
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, n, heads, head_dim, generator=generator).to(dtype) for n in (queries, keys, keys))
    return query, key, value


def fused(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one projection, as a self-attention has them."""
    batch, queries, _, heads, head_dim = case
    qkv = torch.randn(batch, queries, 3, heads, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return qkv.unbind(2)  # type: ignore[return-value]


def shared(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One clip's keys and values for every image, without copies."""
    query, key, value = inputs(case, dtype)
    return query, key[:1].expand_as(key), value[:1].expand_as(value)


def heads_first(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What SDPA takes, seen as tokens: here the kernel copies."""
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(case, dtype))
    return query, key, value


FORMS = {"apart": inputs, "fused": fused, "shared": shared, "heads first": heads_first}


def kernel_error(case: tuple[int, ...], dtype: torch.dtype, form: str, scale: float = 1.0) -> float:
    """In the interpreter's process: the largest difference from the reference in fp64, relative to the largest value."""
    from kernels.triton.flash_attention import launch, tiles

    query, key, value = FORMS[form](case, dtype)
    query = query * scale
    expected = reference.attention(query.double(), key.double(), value.double())
    ours = [launch(query, key, value, tile) for tile in {*tiles(case[4], 80)[:1], *tiles(case[4], 90)}]
    assert all(x.dtype == dtype and x.is_contiguous() and x.shape == expected.shape for x in ours)
    return max(((x.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item() for x in ours)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(interpreted: Executor, case: tuple[int, ...]):
    assert interpreted.submit(kernel_error, case, torch.float32, "apart").result() <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", HALVES)
def test_kernel_equals_the_reference_in_half_precision(interpreted: Executor, case: tuple[int, ...], dtype: torch.dtype):
    assert interpreted.submit(kernel_error, case, dtype, "apart").result() <= TOLERANCES[dtype]


@pytest.mark.parametrize("form", ["fused", "shared", "heads first"])
def test_kernel_reads_inputs_of_any_strides(interpreted: Executor, form: str):
    assert interpreted.submit(kernel_error, (2, 20, 77, 2, 40), torch.float32, form).result() <= TOLERANCES[torch.float32]


def test_large_scores_do_not_overflow(interpreted: Executor):
    error = interpreted.submit(kernel_error, (1, 17, 130, 1, 40), torch.float32, "apart", 1e3).result()
    assert error <= 1e-3  # a score of 1e4 has an error of 1e-3 itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_operation_is_well_formed(form: str, dtype: torch.dtype):
    operation: Any = torch.ops.reelray.attention.default
    torch.library.opcheck(operation, FORMS[form]((2, 3, 5, 2, 8), dtype))


def test_images_that_share_a_text_fold_into_one_sequence():
    query, key, value = inputs((6, 5, 7, 2, 8), torch.float64)
    apart = attention(query, key[:1].expand_as(key), value[:1].expand_as(value))
    folded = attention(query.flatten(0, 1)[None], key[:1], value[:1])
    assert torch.allclose(apart, folded.view_as(apart), atol=1e-12)


@pytest.mark.parametrize(
    ("query", "key"),
    [((1, 3, 2), (1, 3, 2)), ((2, 3, 2, 8), (1, 3, 2, 8)), ((1, 3, 2, 8), (1, 3, 1, 8)), ((1, 3, 2, 8), (1, 0, 2, 8))],
)
def test_shapes_that_do_not_fit_are_refused(query: tuple[int, ...], key: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"\d|no keys"):
        attention(torch.zeros(query), torch.zeros(key), torch.zeros(key))


def compiled(head_dim: int, capability: int, number: int, keys: int) -> Needs:
    """The kernel with one of the tiles for this head dimension."""
    from kernels.triton.flash_attention import constants, kernel, tiles

    strides = [f"{name}_{axis}" for name in ("query", "key", "value") for axis in ("batch", "token")]
    types = dict.fromkeys(("query", "key", "value"), "*fp16") | dict.fromkeys(("queries", "keys", *strides), "i32")
    types["out"] = "*fp16"
    assert kernel.arg_names[: len(types)] == list(types)  # inputs, whole numbers, outputs: TensorRT's order
    tile = tiles(head_dim, capability)[number]
    given = constants(8, head_dim, keys, tile)
    return needs(kernel, types, given, capability, num_warps=tile.warps, num_stages=tile.stages)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_every_tile_offered_fits_its_gpu(head_dim: int, capability: int):
    parts = {40: [(0, 77), (1, 77), (2, 77)], 160: [(0, 77), (1, 77)]}  # a ragged end takes more registers
    forms = parts.get(head_dim, [(0, 4096), (1, 77)])
    for number, keys in forms:
        used = compiled(head_dim, capability, number, keys)
        assert used.spills == 0
        assert used.registers <= 255
        assert used.shared <= SHARED_BYTES[capability]
        assert used.uses_matrix_units
        assert used.count("HGMMA") or capability != 90
        assert used.count("LDGSTS")  # keys and values of the next steps load while this one is computed


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_capability_89_is_offered_the_tiles_that_are_compiled_for_80(head_dim: int):
    from kernels.triton import flash_attention, temporal_attention

    assert flash_attention.tiles(head_dim, 89) == flash_attention.tiles(head_dim, 80)
    assert temporal_attention.tiles(head_dim, 89) == temporal_attention.tiles(head_dim, 80)
