"""Our plugin's machine code on a GPU without TensorRT: CUDA's driver launches it with its arguments only, as TensorRT would."""

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engines.backends.trt.plugin import current_capability, kernel_of, positions_of_block
from kernels.temporal_attention import by_pytorch
from kernels.triton.ahead import Compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: not verified that our plugin's machine code runs with its arguments alone"
    ),
]

SITES = [  # clips, frames, positions, heads, head dimension, whether there is a table
    (2, 16, 67, 8, 40, True),
    (2, 16, 64, 8, 160, True),
    (1, 24, 129, 5, 64, False),
    (1, 3, 1, 3, 8, True),
]
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def launch(kernel: Compiled, blocks: int, inputs: Sequence[Tensor], whole: Sequence[int], out: Tensor) -> None:
    """Launches by `cuLaunchKernel`. Arguments in order: inputs, integers, the output."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode()) == 0
    try:
        assert driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()) == 0
        values = [
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(number) for number in whole),
            ctypes.c_void_p(out.data_ptr()),
        ]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (blocks, 1, 1, kernel.threads, 1, 1, kernel.shared)
        assert driver.cuLaunchKernel(function, *shape, stream, places, None) == 0
        torch.cuda.synchronize()
    finally:
        driver.cuModuleUnload(module)


@pytest.mark.parametrize("tactic", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_machine_code_computes_attention_over_frames(
    site: tuple[int, int, int, int, int, bool], dtype: torch.dtype, tactic: int
):
    clips, frames, positions, heads, head_dim, with_table = site
    capability = current_capability()
    try:
        of_block = positions_of_block(frames, head_dim, capability, tactic)
    except IndexError:
        pytest.skip(f"only one tile on {capability}")
    torch.manual_seed(0)
    width = 3 * heads * head_dim
    qkv = torch.randn(clips * frames, positions, width, device="cuda").to(dtype)
    position = torch.randn(32, width, device="cuda").to(dtype) if with_table else None
    kernel = kernel_of(frames, heads, width, with_table, DTYPES[dtype], capability, tactic)
    out = torch.full((clips * frames, positions, width // 3), torch.nan, device="cuda", dtype=dtype)
    inputs = [qkv] if position is None else [qkv, position]
    launch(kernel, clips * -(-positions // of_block) * heads, inputs, (positions, *qkv.stride()[:2]), out)
    expected = by_pytorch(qkv.float(), frames, heads, None if position is None else position.float())
    torch.testing.assert_close(out.float(), expected, atol=5e-2 if dtype == torch.bfloat16 else 1e-2, rtol=2e-2)
