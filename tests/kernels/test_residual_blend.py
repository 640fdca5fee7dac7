from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.choice import forced
from kernels.residual_blend import residual_add, residual_blend
from kernels.triton import residual_blend as residual_blend_triton
from kernels.triton.tile import Tile
from tests.kernels.fusions import HALVES, TOLERANCES, assert_streams, error, values
from tests.kernels.offline import TARGETS

SHAPES = [(1, 1, 1), (1, 35, 320), (5, 7, 90), (3, 33, 96)]  # (N, L, C)
BIASES = [None, "layer", "image"]
TYPES = {"h": "*fp16", "residual": "*fp16", "rows": "i32", "channels": "i32", "out": "*fp16"}
FULL = TYPES | {"bias": "*fp16", "other": "*fp16", "mix": "*fp32"}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, bias: str | None, blend: bool) -> tuple[Tensor | None, ...]:
    n, _, c = shape
    of_bias = {None: None, "layer": values(c, seed=2), "image": values(n, c, seed=2)}[bias]
    h, residual, other = (values(*shape, dtype=dtype, seed=seed) for seed in (0, 1, 3))
    mix = torch.tensor([0.3]) if blend else None
    return h, residual, None if of_bias is None else of_bias.to(dtype), other if blend else None, mix


def interpreter_error(shape: tuple[int, int, int], dtype: torch.dtype, bias: str | None, blend: bool, tile: Tile) -> float:
    given = inputs(shape, dtype, bias, blend)
    ours = residual_blend_triton.launch(*given, tile)
    assert ours.dtype == dtype
    wide = (None if tensor is None else tensor.double() for tensor in given)
    return error(ours, reference.residual_blend(*wide))


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[2], half) for half in HALVES)]
)
@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("bias", BIASES)
def test_the_kernel_equals_the_reference(
    interpreted: Executor, shape: tuple[int, int, int], bias: str | None, blend: bool, dtype: torch.dtype
):
    found = interpreted.submit(interpreter_error, shape, dtype, bias, blend, residual_blend_triton.TILES[0]).result()
    assert found <= TOLERANCES[dtype]


@pytest.mark.parametrize("tile", residual_blend_triton.TILES[1:])
def test_every_tile_gives_the_same(interpreted: Executor, tile: Tile):
    assert interpreted.submit(interpreter_error, (5, 7, 90), torch.float32, "image", True, tile).result() <= 2e-5


def test_the_references_are_the_layers_own_operations():
    h, residual, bias, other, mix = inputs((5, 7, 90), torch.float64, "layer", True)
    assert error(reference.residual_blend(h, residual, bias, None, None), residual + (h + bias)) < 1e-14
    expected = torch.lerp(residual + (h + bias), other, float(mix))
    assert error(reference.residual_blend(h, residual, bias, other, mix), expected) < 1e-14


def test_a_bias_of_each_image_is_that_of_a_time_embedding():
    h, residual, bias, _, _ = inputs((5, 7, 90), torch.float64, "image", False)
    images = h.unflatten(1, (7, 1)).permute(0, 3, 1, 2)  # (N, C, H, W) in channels-last memory
    expected = residual.unflatten(1, (7, 1)) + (images + bias[:, :, None, None]).permute(0, 2, 3, 1)
    assert error(residual_add(images.permute(0, 2, 3, 1), residual.unflatten(1, (7, 1)), bias), expected) < 1e-14


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
@pytest.mark.parametrize("bias", BIASES)
def test_without_a_gpu_the_operation_is_the_reference(bias: str | None, dtype: torch.dtype):
    h, residual, vector, other, mix = inputs((5, 7, 90), dtype, bias, True)
    with forced("kernels"):
        assert torch.equal(residual_add(h, residual, vector), reference.residual_blend(h, residual, vector, None, None))
        blended = residual_blend(h, residual, other, mix, vector)
    assert torch.equal(blended, reference.residual_blend(h, residual, vector, other, mix))


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
@pytest.mark.parametrize("bias", BIASES)
def test_where_nothing_was_measured_pytorch_computes_the_same(bias: str | None, dtype: torch.dtype):
    h, residual, vector, other, mix = inputs((5, 7, 90), dtype, bias, True)
    wide = [None if t is None else t.double() for t in (h, residual, vector, other, mix)]
    tolerance = TOLERANCES.get(dtype, 1e-13)
    assert error(residual_add(h, residual, vector), reference.residual_blend(*wide[:3], None, None)) <= tolerance
    assert error(residual_blend(h, residual, other, mix, vector), reference.residual_blend(*wide)) <= tolerance


@pytest.mark.parametrize(("bias", "blend"), [(None, False), ("image", True)])
def test_the_operation_is_registered_soundly(bias: str | None, blend: bool):
    torch.library.opcheck(torch.ops.reelray.residual_blend, inputs((2, 3, 4), torch.float32, bias, blend))


def test_shapes_that_would_broadcast_are_refused():
    h = values(3, 4, 5)
    with pytest.raises(AssertionError):
        residual_add(h, h[:1])
    with pytest.raises(AssertionError):
        residual_add(h, h, values(4))
    with pytest.raises(AssertionError):
        residual_blend(h, h, h, torch.tensor(0.5))


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("tile", residual_blend_triton.TILES)
def test_every_tile_fits_every_card(tile: Tile, capability: int):
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    assert_streams(residual_blend_triton.blend_rows, FULL, constants, capability, tile.warps)


def test_the_residual_alone_fits_too():
    tile = residual_blend_triton.TILES[0]
    constants = {"bias": None, "other": None, "mix": None, "ROWS": tile.rows, "COLUMNS": tile.columns}
    assert_streams(residual_blend_triton.blend_rows, TYPES, constants, 90, tile.warps)
