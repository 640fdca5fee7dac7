"""Our kernel for attention over frames as a TensorRT plugin. It is an option and not the default, as it was never measured there.

It is a quickly deployable plugin in its ahead-of-time form: the machine code becomes part of the plan, and a plan runs without
Python, Triton or this file. While a plan is built, TensorRT requests the kernel for each site and each of our tiles, times them
and keeps one. `tensorrt-triton.md`, sections 3 and 5. TensorRT-RTX has no plugins.

The kernel depends on the number of frames, so a plan with plugins is for one number: `frames_of`. Height and width may change.

TensorRT has never run this. Three assumptions are untested. Tensors start at multiples of 16 bytes, as the kernel reads 16 at
once. TensorRT accepts Triton's version of PTX, which the driver must know. And its assembler does as well without the option that
Triton gives its own (`--regAllocOptLevel=2`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.backends.shapes import ShapeFamily
from engines.backends.trt.export import DOMAIN, PLUGINS, TEMPORAL, TEMPORAL_WITH_TABLE
from engines.backends.trt.ptx import POINTER, WHOLE, without_hidden
from engines.errors import EngineError

if TYPE_CHECKING:
    from kernels.triton.ahead import Compiled
    from kernels.triton.temporal_attention import Tile

Numbers = NDArray[np.int32]

TYPES = {"HALF": ("FP16", "fp16"), "BF16": ("BF16", "bf16")}
"""TensorRT's name of a dtype -> its name in TensorRT's plugins, and in Triton. Our kernels take no fp32 (`kernels/choice.py`)."""

MOST_SHARED_BYTES = 48 * 1024
"""A kernel gets more only if the launcher requests it from the driver, and TensorRT is not documented to do so."""


def frames_of(library: ModuleType, plugins: Sequence[str], families: Sequence[ShapeFamily], dtype: torch.dtype) -> int:
    """How many frames a plan with these plugins is for. 0 without plugins: the plan is then for any number.

    dtype: of the graph. Raises `EngineError` as `require_plugins` does, for a dtype that the kernels do not support, and for
    families with several numbers of frames or with too many frames.
    """
    if not plugins:
        return 0
    require_plugins(library, plugins)
    from kernels.triton.temporal_attention import MOST_FRAMES  # imported late: triton is only needed with plugins

    if dtype not in (torch.float16, torch.bfloat16):
        raise EngineError(f"plugins compute in float16 or bfloat16, not in {dtype}")
    frames = {shape.frames for family in families for shape in (family.smallest, family.largest)}
    if len(frames) != 1:
        raise EngineError(f"a plan with plugins is for one number of frames, not for {sorted(frames)}")
    if max(frames) > MOST_FRAMES:
        raise EngineError(f"our attention over frames is for {MOST_FRAMES} at most, not for {max(frames)}")
    return frames.pop()


def require_plugins(library: ModuleType, plugins: Sequence[str]) -> None:
    """Raises `EngineError` for operations that have no plugin, for a library that has none at all, and without triton.

    Must be called before a plugin is registered: TensorRT-RTX aborts the process if a graph contains a registered plugin.
    """
    if library.__name__ != "tensorrt":
        raise EngineError(f"{library.__name__} has no plugins: build with TensorRT, or without {sorted(plugins)}")
    if unknown := set(plugins) - PLUGINS:
        raise EngineError(f"there is no plugin for {sorted(unknown)}, only for {sorted(PLUGINS)}")
    if find_spec("triton") is None:
        raise EngineError("triton is not installed, and a plugin needs it: pip install 'reelray[gpu]'")


@cache
def register() -> None:
    """Registers our nodes with TensorRT's parser, once per process, as its registry lasts for the whole process.

    Annotations are part of the interface: they show TensorRT what is a tensor and what an attribute. There is only one attribute,
    because several would be passed by position. It is an array, because 10.16 fails on a single number with numpy 2.4. Raises
    `EngineError` if this TensorRT has no such plugins.
    """
    try:
        import tensorrt.plugin as trtp
    except ImportError as exc:
        raise EngineError(f"tensorrt.plugin cannot be imported: {exc}") from exc

    def output(qkv: Any) -> Any:
        images, positions, width = qkv.shape_expr
        return trtp.from_shape_expr((images, positions, width // 3), qkv.dtype)

    def offered(qkv: Any, tensors: int) -> list[Any]:
        name, _ = _types(qkv)
        tactics = list(range(1, 1 + len(_tiles(64, current_capability()))))  # TensorRT uses 0 for "no tactic"
        return [trtp.AutoTuneCombination(", ".join([name] * tensors), "LINEAR", tactics)]

    def implemented(qkv: Any, with_table: bool, attribute: Numbers, tactic: int) -> tuple[Any, Any, Any, Any]:
        frames, heads = (int(number) for number in attribute)
        images, positions, width = qkv.shape_expr
        capability, head_dim = current_capability(), qkv.shape[2] // 3 // heads
        kernel = kernel_of(frames, heads, qkv.shape[2], with_table, _types(qkv)[1], capability, tactic)
        blocks = images // frames * trtp.cdiv(positions, positions_of_block(frames, head_dim, capability, tactic)) * heads
        launch = trtp.KernelLaunchParams(grid_x=blocks, block_x=kernel.threads, shared_mem=kernel.shared)
        return kernel.entry, kernel.ptx, launch, trtp.SymIntExprs.from_tuple((positions, positions * width, width))

    alone, placed = f"{DOMAIN}::{TEMPORAL}", f"{DOMAIN}::{TEMPORAL_WITH_TABLE}"

    @trtp.register(alone)
    def _(qkv: trtp.TensorDesc, frames_and_heads: Numbers) -> trtp.TensorDesc:
        return output(qkv)

    @trtp.autotune(alone)
    def _(qkv: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> list[trtp.AutoTuneCombination]:
        return offered(qkv, tensors=2)

    @trtp.aot_impl(alone)
    def _(
        qkv: trtp.TensorDesc, frames_and_heads: Numbers, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return implemented(qkv, False, frames_and_heads, tactic)

    @trtp.register(placed)
    def _(qkv: trtp.TensorDesc, position: trtp.TensorDesc, frames_and_heads: Numbers) -> trtp.TensorDesc:
        return output(qkv)

    @trtp.autotune(placed)
    def _(qkv: trtp.TensorDesc, position: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> list[trtp.AutoTuneCombination]:
        return offered(qkv, tensors=3)

    @trtp.aot_impl(placed)
    def _(
        qkv: trtp.TensorDesc, position: trtp.TensorDesc, frames_and_heads: Numbers, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return implemented(qkv, True, frames_and_heads, tactic)


def kernel_of(frames: int, heads: int, width: int, with_table: bool, dtype: str, capability: int, tactic: int) -> "Compiled":
    """The kernel as a plan stores it. width: of qkv, 3 x heads x D. dtype: "fp16" or "bf16". tactic: a tile's number, from 1.

    Raises `EngineError` for heads that no tile serves.
    """
    from kernels.triton.temporal_attention import ahead

    head_dim = width // 3 // heads
    try:
        made = ahead(frames, heads, head_dim, with_table, dtype, capability, _tiles(head_dim, capability)[tactic - 1])
    except ValueError as exc:
        raise EngineError(f"our attention over frames cannot be a plugin here: {exc}") from exc
    if made.shared > MOST_SHARED_BYTES:
        raise EngineError(f"a block of {made.entry} wants {made.shared} bytes of shared memory")
    arguments = [POINTER, *[POINTER] * with_table, WHOLE, WHOLE, WHOLE, POINTER]
    return replace(made, ptx=without_hidden(made.ptx, made.entry, arguments, made.scratch))


def positions_of_block(frames: int, head_dim: int, capability: int, tactic: int) -> int:
    """How many positions one block of `kernel_of` computes, for one head."""
    from kernels.triton.temporal_attention import padded

    return _tiles(head_dim, capability)[tactic - 1].rows // padded(frames)


def current_capability() -> int:
    """The compute capability of the GPU on which a plan is being built."""
    from kernels.triton.device import capability

    return capability(torch.device("cuda", torch.cuda.current_device()))


def _tiles(head_dim: int, capability: int) -> tuple["Tile", ...]:
    from kernels.triton.temporal_attention import tiles

    return tiles(head_dim, capability)


def _types(qkv: Any) -> tuple[str, str]:
    """The name of a tensor's type in TensorRT's plugins and in Triton."""
    name = qkv.dtype.name
    if name not in TYPES:
        raise EngineError(f"plugins compute in {sorted(TYPES)}, not in {name}")
    return TYPES[name]
