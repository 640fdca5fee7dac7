"""The GPU and driver that a plan is for.

The driver's version comes from NVML by ctypes. NVML is part of every driver, and `nvidia-smi` uses it. `cuDriverGetVersion`, and
with it torch, only gives the CUDA version that a driver supports, which is the same for several branches of drivers.
"""

import ctypes

import torch

from engines.backends.trt.cache import Gpu
from engines.errors import EngineError

_NVML = "libnvidia-ml.so.1"
_LENGTH = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
_SUCCESS = 0


def gpu_of(device: torch.device) -> Gpu:
    """The GPU and its driver. Raises `EngineError` where NVML does not answer."""
    about = torch.cuda.get_device_properties(device)
    return Gpu(about.name, (about.major, about.minor), about.multi_processor_count, driver_major())


def driver_major(library: str = _NVML) -> int:
    """The driver's branch: 580 of 580.95.05. library: NVML's name or path. Raises `EngineError` where it does not answer."""
    text = ctypes.create_string_buffer(_LENGTH)
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != _SUCCESS:
            raise EngineError(f"{library} cannot be initialised")
        try:
            failed = nvml.nvmlSystemGetDriverVersion(text, _LENGTH) != _SUCCESS
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError) as exc:
        raise EngineError(f"{library} cannot be asked for the driver's version: {exc}") from exc
    major = text.value.decode().partition(".")[0]
    if failed or not major.isdecimal():
        raise EngineError(f"{library} does not tell the driver's version")
    return int(major)
