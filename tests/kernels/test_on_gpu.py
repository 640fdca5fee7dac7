"""What only a GPU can show: that the compiled kernels compute what PyTorch's do."""

import pytest
import torch

from kernels.bench import Site, all_sites, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: compiled kernels were not run, only interpreted and assembled"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("site", all_sites(), ids=lambda site: f"{site.operation}-{site.name}")
def test_compiled_kernels_compute_what_pytorch_does(site: Site, dtype: torch.dtype):
    result = measure(site, torch.device("cuda"), dtype, tiny=True)
    assert result.ours
    assert result.theirs
    assert not set(result.ours) & set(result.refused)
