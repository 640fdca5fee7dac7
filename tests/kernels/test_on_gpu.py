"""Needs a GPU: the compiled kernels compute what PyTorch computes."""

from typing import Literal

import pytest
import torch

from kernels import reference
from kernels.attention import attention
from kernels.bench import Site, all_sites, compare
from kernels.choice import forced
from kernels.temporal_attention import temporal_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: compiled kernels were not run, only interpreted and assembled"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("site", all_sites(), ids=lambda site: f"{site.operation}-{site.name}")
def test_compiled_kernels_compute_what_pytorch_does(site: Site, dtype: torch.dtype):
    contest, refused, _ = compare(site, torch.device("cuda"), dtype, tiny=True)
    assert contest.ours
    assert not contest.ours.keys() & refused.keys()
    assert contest.theirs.keys() - refused.keys()


@pytest.mark.parametrize("back_end", ["kernels", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [40, 64, 160, 168])  # our kernels do not support 168
def test_the_operations_of_attention_compute_their_equation(
    head_dim: int, dtype: torch.dtype, back_end: Literal["kernels", "pytorch"]
):
    torch.manual_seed(0)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}[dtype]
    qkv = torch.randn(32, 65, 3 * 2 * head_dim, device="cuda", dtype=dtype)
    position = torch.randn(32, 3 * 2 * head_dim, device="cuda", dtype=dtype)
    query, key, value = qkv.unflatten(-1, (3, 2, -1)).unbind(2)
    with forced(back_end):
        seen, over_frames = attention(query, key, value), temporal_attention(qkv, 16, 2, position)
    expected = reference.attention(query.double(), key.double(), value.double())
    assert (seen.double() - expected).abs().max() <= tolerance * expected.abs().max()
    summed = (qkv.unflatten(0, (2, 16)) + position[:16, None]).flatten(0, 1)  # rounded, as both back ends do
    expected = reference.temporal_attention(summed.double(), 16, 2)
    assert (over_frames.double() - expected).abs().max() <= tolerance * expected.abs().max()
