from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor, nn

from kernels import reference
from kernels.choice import forced
from kernels.layer_norm import layer_norm
from kernels.triton import layer_norm as layer_norm_triton
from kernels.triton.tile import Tile
from tests.kernels.fusions import TOLERANCES, assert_streams, error, values
from tests.kernels.offline import TARGETS

SHAPES = [((1, 1, 1), 0), ((1, 7, 320), 0), ((5, 3, 96), 0), ((3, 14, 90), 1), ((2, 5, 3, 96), 1)]  # and the positions' axis
CUTS = [(layer_norm_triton.VALUES[0], 1280), *((tile, 320) for tile in layer_norm_triton.VALUES)]  # tiles and widths
TYPES = {"x": "*fp16", "weight": "*fp16", "bias": "*fp16"} | dict.fromkeys(("rows", "channels", "inner", "length"), "i32")
TYPES |= {"out": "*fp16"}


def inputs(
    shape: tuple[int, ...], axis: int, positions: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    c = shape[-1]
    table = values(shape[axis] + 2, c, dtype=dtype, seed=3) if positions else None
    return values(*shape, dtype=dtype, offset=0.5), values(c, dtype=dtype, seed=1), values(c, dtype=dtype, seed=2), table


def interpreter_error(shape: tuple[int, ...], axis: int, positions: bool, dtype: torch.dtype, tile: Tile) -> float:
    x, weight, bias, table = inputs(shape, axis, positions, dtype)
    ours = layer_norm_triton.launch(x, weight, bias, 1e-5, table, axis, tile)
    assert ours.dtype == dtype
    wide = None if table is None else table.double()
    return error(ours, reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5, positions=wide, axis=axis))


def interpreter_error_of_a_large_mean() -> float:
    x = values(4, 320, dtype=torch.float32, offset=1000.0)
    weight, bias = torch.ones(320), torch.zeros(320)
    ours = layer_norm_triton.launch(x, weight, bias, 1e-5, None, 0)
    return error(ours, reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_kernel_equals_the_reference(
    interpreted: Executor, shape: tuple[int, ...], axis: int, positions: bool, dtype: torch.dtype
):
    found = interpreted.submit(interpreter_error, shape, axis, positions, dtype, layer_norm_triton.VALUES[0]).result()
    assert found <= TOLERANCES[dtype]


@pytest.mark.parametrize("tile", layer_norm_triton.VALUES[1:])
def test_every_tile_gives_the_same(interpreted: Executor, tile: Tile):
    assert interpreted.submit(interpreter_error, (3, 14, 90), 1, True, torch.float32, tile).result() <= 2e-5


def test_a_large_mean_costs_the_kernel_no_variance(interpreted: Executor):
    assert interpreted.submit(interpreter_error_of_a_large_mean).result() <= 2e-4  # fp32 holds 1000 to 6e-5


def test_the_reference_is_torchs_layer_norm():
    x, weight, bias, table = inputs((3, 14, 90), 1, True, torch.float64)
    norm = nn.LayerNorm(90).double()
    norm.load_state_dict({"weight": weight, "bias": bias})
    assert error(reference.layer_norm(x, weight, bias, 1e-5), norm(x)) < 1e-13
    assert error(reference.layer_norm(x, weight, bias, 1e-5, positions=table, axis=1), norm(x) + table[:14]) < 1e-13
    x = x.transpose(0, 1).contiguous()
    assert error(reference.layer_norm(x, weight, bias, 1e-5, positions=table), norm(x) + table[:14, None]) < 1e-13


@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_without_a_gpu_the_operation_is_the_reference(dtype: torch.dtype):
    x, weight, bias, table = inputs((3, 14, 90), 1, True, dtype)
    expected = reference.layer_norm(x, weight, bias, 1e-5, positions=table, axis=1)
    with forced("kernels"):
        assert torch.equal(layer_norm(x, weight, bias, positions=table, axis=1), expected)


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.float64])
def test_where_nothing_was_measured_pytorch_computes_the_same(dtype: torch.dtype, with_table: bool):
    x, weight, bias, table = inputs((3, 14, 90), 1, with_table, dtype)
    wide = None if table is None else table.double()
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5, positions=wide, axis=1)
    assert error(layer_norm(x, weight, bias, positions=table, axis=1), expected) <= TOLERANCES.get(dtype, 1e-13)


@pytest.mark.parametrize("positions", [False, True])
def test_the_operation_is_registered_soundly(positions: bool):
    x, weight, bias, table = inputs((2, 3, 8), 0, positions, torch.float32)
    torch.library.opcheck(torch.ops.reelray.layer_norm, (x, weight, bias, 1e-5, table, 0))


def test_a_table_that_is_too_short_is_refused():
    x, weight, bias, table = inputs((5, 3, 8), 0, True, torch.float32)
    with pytest.raises(AssertionError):
        layer_norm(x, weight, bias, positions=table[:4])


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("tile", "width"), CUTS)
def test_every_tile_fits_every_card(tile: Tile, width: int, capability: int):
    cut = layer_norm_triton.cut_rows(tile, width)
    constants = {"EPS": 1e-5, "ROWS": cut.rows, "COLUMNS": cut.columns}
    assert_streams(layer_norm_triton.layer_norm_rows, TYPES | {"positions": "*fp16"}, constants, capability, cut.warps)


def test_it_fits_where_triton_takes_the_one_row_between_positions_for_a_constant():
    """AnimateDiff's layout. Triton treats integer arguments of value 1 as constants."""
    cut = layer_norm_triton.cut_rows(layer_norm_triton.VALUES[0], 320)
    constants = {"EPS": 1e-5, "ROWS": cut.rows, "COLUMNS": cut.columns, "inner": 1}
    types = {name: kind for name, kind in (TYPES | {"positions": "*fp16"}).items() if name != "inner"}
    assert_streams(layer_norm_triton.layer_norm_rows, types, constants, 90, cut.warps)


def test_without_positions_it_fits_too():
    cut = layer_norm_triton.cut_rows(layer_norm_triton.VALUES[0], 320)
    constants = {"EPS": 1e-5, "ROWS": cut.rows, "COLUMNS": cut.columns, "positions": None}
    assert_streams(layer_norm_triton.layer_norm_rows, TYPES, constants, 90, cut.warps)
