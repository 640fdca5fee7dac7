import pytest
import torch

from kernels import reference
from kernels.attention import attention

SHAPES = [(1, 1, 1, 1, 8), (2, 8, 16, 16, 40), (3, 4, 37, 77, 80), (2, 4, 5, 1, 64)]  # awkward ones among them


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_equals_its_equation(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float):
    b, heads, n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(b, length, heads, d, generator=generator, dtype=torch.float64) for length in (n, m, m))
    expected = reference.attention(query, key, value)
    ours = attention(query.to(dtype), key.to(dtype), value.to(dtype)).double()
    assert (ours - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())
