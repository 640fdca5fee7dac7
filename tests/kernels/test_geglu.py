from concurrent.futures import Executor

import pytest
import torch

from kernels import reference
from kernels.choice import forced
from kernels.geglu import geglu
from kernels.triton import geglu as geglu_triton
from kernels.triton.tile import Tile
from tests.kernels.fusions import TOLERANCES, assert_streams, error, values
from tests.kernels.offline import TARGETS

SHAPES = [(1, 2), (3, 5, 2 * 90), (1, 9, 2 * 320), (2, 7, 2 * 384)]


def interpreter_error(shape: tuple[int, ...], dtype: torch.dtype, tile: Tile) -> float:
    x = values(*shape, dtype=dtype)
    ours = geglu_triton.launch(x, tile)
    assert ours.dtype == dtype
    return error(ours, reference.geglu(x.double()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_reference(interpreted: Executor, shape: tuple[int, ...], dtype: torch.dtype):
    assert interpreted.submit(interpreter_error, shape, dtype, geglu_triton.TILES[0]).result() <= TOLERANCES[dtype]


@pytest.mark.parametrize("tile", geglu_triton.TILES[1:])
def test_every_tile_gives_the_same(interpreted: Executor, tile: Tile):
    assert interpreted.submit(interpreter_error, (3, 5, 2 * 90), torch.float32, tile).result() <= 2e-5


def test_the_reference_is_diffusers_geglu():
    from diffusers.models.activations import GEGLU  # slow to import, and not needed in the interpreter's process

    layer = GEGLU(20, 50).double()
    x = values(2, 7, 20)
    assert error(reference.geglu(layer.proj(x)), layer(x)) < 1e-14


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_without_a_gpu_the_operation_is_the_reference(dtype: torch.dtype):
    x = values(3, 5, 2 * 90, dtype=dtype)
    with forced("kernels"):
        assert torch.equal(geglu(x), reference.geglu(x))


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_where_nothing_was_measured_pytorch_computes_the_same(dtype: torch.dtype):
    x = values(3, 5, 2 * 90, dtype=dtype)
    assert error(geglu(x), reference.geglu(x.double())) <= TOLERANCES.get(dtype, 1e-13)


def test_the_operation_is_registered_soundly():
    torch.library.opcheck(torch.ops.reelray.geglu, (values(3, 4, 10, dtype=torch.float32),))


def test_a_projection_of_odd_width_is_refused():
    with pytest.raises(AssertionError):
        geglu(values(2, 5))


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("tile", geglu_triton.TILES)
def test_every_tile_fits_every_card(tile: Tile, capability: int):
    types = {"x": "*fp16", "rows": "i32", "width": "i32", "out": "*fp16"}
    assert_streams(geglu_triton.geglu_rows, types, {"ROWS": tile.rows, "COLUMNS": tile.columns}, capability, tile.warps)


@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_other_dtypes_fit_too(kind: str):
    tile = geglu_triton.TILES[0]
    types = {"x": kind, "rows": "i32", "width": "i32", "out": kind}
    assert_streams(geglu_triton.geglu_rows, types, {"ROWS": tile.rows, "COLUMNS": tile.columns}, 90, tile.warps)
