"""A UNet's call as a function of flat tensors by name, which is what graphs, engines and their profiles know.

A model's own call takes lists and dataclasses; how those become names is said in its folder's `call.py`. What a request or a
step fixes (text keys and values, biases of times and contexts) stays an input, so an engine holds nothing but the weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from engines.backends.shapes import Shape

_TRACED = 4  # frames of the example, which no graph remembers

T = TypeVar("T")

Dims = tuple[int | str, ...]
"""A shape; a name stands for what may change: "frames", "height", "width" in latents, or "height/2" at a deeper level."""


@dataclass(frozen=True)
class UNetCall:
    """One way in which a UNet is called.

    name: for logs and files, e.g. "motion-2-controlled". module: takes the inputs in order and gives noise or velocity, of the
    latents' shape. example: of each input, by name in order. dims: the shapes they may take. multiple: what the latents' height
    and width must be multiples of.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    dims: Mapping[str, Dims]
    multiple: int

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Every input's shape. Raises `ValueError` for latents whose sides are not multiples of `multiple`."""
        if shape.height % self.multiple or shape.width % self.multiple:
            raise ValueError(f"height {shape.height} or width {shape.width} is not a multiple of {self.multiple}")
        return {name: tuple(_size(dim, shape) for dim in dims) for name, dims in self.dims.items()}

    def shape_of(self, inputs: Mapping[str, Tensor]) -> Shape:
        """The frames, height and width of these inputs."""
        sizes = dict(zip(self.dims["latents"], inputs["latents"].shape, strict=True))
        return Shape(sizes["frames"], sizes["height"], sizes["width"])


def unet_call(name: str, module: nn.Module, dims: Mapping[str, Dims], like: Tensor, multiple: int) -> UNetCall:
    """With small tensors of the kind of `like` as the example. Height and width differ, or an exporter takes them for one."""
    shape = Shape(_TRACED, 4 * multiple, 6 * multiple)
    sizes = {key: tuple(_size(dim, shape) for dim in value) for key, value in dims.items()}
    example = {key: torch.linspace(0, 1, math.prod(size)).reshape(size).to(like) for key, size in sizes.items()}
    return UNetCall(name, module, example, dims, multiple)


def skip_levels(down: nn.ModuleList, entry: int) -> list[tuple[int, int]]:
    """(channels, how often the latents' size is divided) of every skip tensor. down: `DownBlock`s. entry: channels of conv_in."""
    levels, ratio = [(entry, 1)], 1
    for block in down:
        levels += [(layer.out_channels, ratio) for layer in block.layers]  # type: ignore[union-attr]
        if (downsampler := block.downsampler) is not None:
            ratio *= 2
            levels.append((downsampler.conv.out_channels, ratio))  # type: ignore[union-attr, arg-type]
    return levels


def numbered(name: str, values: Sequence[T]) -> list[tuple[str, T]]:
    """The values as name_0, name_1 and so on."""
    return [(f"{name}_{i}", value) for i, value in enumerate(values)]


def sides(ratio: int) -> tuple[str, str]:
    """Height and width at a level whose images are `ratio` times smaller than the latents."""
    return ("height", "width") if ratio == 1 else (f"height/{ratio}", f"width/{ratio}")


def _size(dim: int | str, shape: Shape) -> int:
    """The number that a dimension is."""
    if isinstance(dim, int):
        return dim
    if "*" in dim:
        factor, _, name = dim.partition("*")
        return int(factor) * int(getattr(shape, name))
    name, _, divisor = dim.partition("/")
    return int(getattr(shape, name)) // int(divisor or 1)
