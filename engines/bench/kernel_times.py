"""Where a GPU's time goes in one run of a way: seconds and launches by kind of kernel, and the longest kernels by name."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|^kernel$"),
    ("norm", r"norm|moments|channel_affine|apply_affine"),
    ("copy", r"nchwto|nhwcto|copy|memcpy|memset|catarray|transpose|fill"),
    ("convolution", r"conv|fprop|dgrad|winograd|implicit"),
    ("product", r"gemm|nvjet|cublas|cutlass|matmul|splitk|gemv"),
    ("elementwise", r"elementwise|geglu|blend|upsample|vectorized|reduce|softmax|triton"),
)
"""A kernel belongs to the first kind whose pattern matches its name, ignoring case. Our attention kernels are named "kernel"."""
LONGEST = 12


@dataclass(frozen=True)
class KernelTime:
    """name: of a kind or a kernel. seconds: in one run. launches: in one run."""

    name: str
    seconds: float
    launches: int


def kernel_times(run: Callable[[], Any]) -> tuple[tuple[KernelTime, ...], tuple[KernelTime, ...]]:
    """The times of one run by kind and by kernel, the longest first. CUDA only. Run it once before, or compiling is counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    on_gpu = (event for event in profiled.key_averages() if event.device_type == torch._C._autograd.DeviceType.CUDA)
    kernels = sorted(
        (KernelTime(event.key, event.self_device_time_total / 1e6, event.count) for event in on_gpu), key=lambda k: -k.seconds
    )
    return by_kind(kernels), tuple(KernelTime(k.name[:120], k.seconds, k.launches) for k in kernels[:LONGEST])


def by_kind(kernels: Iterable[KernelTime]) -> tuple[KernelTime, ...]:
    """The sums of each kind, the longest first."""
    found: dict[str, list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        found[kind_of(kernel.name)].append(kernel)
    sums = (KernelTime(kind, sum(k.seconds for k in of), sum(k.launches for k in of)) for kind, of in found.items())
    return tuple(sorted(sums, key=lambda k: -k.seconds))


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name; "other" where no pattern fits."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE)), "other")
