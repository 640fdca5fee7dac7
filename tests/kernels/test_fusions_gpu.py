"""Needs a GPU: the fusions with every tile at every production shape, and the operations as models call them."""

import pytest
import torch

from kernels import reference
from kernels.bench_fusions import SITES
from kernels.choice import forced
from kernels.geglu import geglu
from kernels.group_norm_silu import group_norm_silu
from kernels.layer_norm import layer_norm
from kernels.residual_blend import residual_add
from tests.kernels.fusions import error, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no GPU: not verified that compiled fusions equal PyTorch's at production shapes",
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operation", sorted({site.operation for site in SITES}))
def test_every_tile_equals_torch_at_every_site_and_itself_when_repeated(operation: str, dtype: torch.dtype):
    torch.manual_seed(0)
    for site in (site for site in SITES if site.operation == operation):
        contest = site.prepare(torch.device("cuda"), dtype, False)
        expected = contest.theirs["eager"]()
        for name, way in contest.ours.items():
            ours = way()
            apart = error(ours, expected.reshape(ours.shape))
            assert apart <= (1e-2 if dtype == torch.float16 else 5e-2), (site.name, name)  # PyTorch's rounds intermediate results
            assert torch.equal(ours, way()), (site.name, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operations_launch_the_kernels(dtype: torch.dtype):
    x = values(10, 96, 7, 5, dtype=dtype).contiguous(memory_format=torch.channels_last).cuda()
    weight, bias = values(2, 96, dtype=dtype, seed=1).cuda()
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    wide = x.double(), weight.double(), bias.double()
    expected = reference.group_norm_silu(*wide, 8, 1e-5, num_frames=5)
    tokens = x.permute(0, 2, 3, 1)
    double = tokens.double()
    with forced("kernels"):
        assert error(group_norm_silu(x, weight, bias, 8, num_frames=5), expected) <= tolerance
        assert error(geglu(tokens), reference.geglu(double)) <= tolerance
        assert error(residual_add(tokens, tokens, bias), 2 * double + bias.double()) <= tolerance
        assert error(layer_norm(tokens, weight, bias), reference.layer_norm(double, *wide[1:], 1e-5)) <= tolerance
