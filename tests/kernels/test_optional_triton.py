import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
import kernels.attention
from kernels import bench_fusions
from kernels.bench import measure
for site in {site.operation: site for site in bench_fusions.SITES}.values():
    measure(site, torch.device("cpu"), torch.float32, tiny=True)
from kernels.temporal_attention import temporal_attention
assert temporal_attention(torch.zeros(4, 3, 48), 2, 2).shape == (4, 3, 16)
"""


def test_every_operation_works_where_triton_is_not_installed():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
