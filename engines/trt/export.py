"""Our own UNet calls as ONNX graphs, one for every number of frames, height and width, with attention in one operator.

A UNet call takes lists and dataclasses; a graph takes tensors by name. Here stands how the one becomes the other, for the
exporter, for the profiles and for whoever runs the engine. What a request or a step fixes (text keys and values, biases of
times and contexts) stays an input, so an engine holds nothing but the weights. `tensorrt-triton.md`, section 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engines.animatediff.layers import CrossAttention, KeyValue, TextContext
from engines.animatediff.unet import MotionUNet, Residuals
from engines.controlnext.layers import Biases, SelfAttention
from engines.controlnext.unet import Control, Half, SVDUNet

OPSET = 23
"""The first with `Attention`; below it SDPA falls apart into MatMul and Softmax, and TensorRT sees twice the layers."""

OUTPUT = "output"
"""The graph's one output: noise or velocity, of the latents' shape."""

_TOKENS = 77  # of CLIP's text
_TRACED = 4  # frames of the example, which the graph does not remember

T = TypeVar("T")

Dims = tuple[int | str, ...]
"""A shape; a name stands for what may change: "frames", "height", "width" in latents, or "height/2" at a deeper level."""


@dataclass(frozen=True)
class UNetCall:
    """What is exported: a module of flat tensors, an example of each input by name in order, and the shapes they may take.

    multiple: what the latents' height and width must be multiples of.
    """

    module: nn.Module
    example: Mapping[str, Tensor]
    dims: Mapping[str, Dims]
    multiple: int

    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Every input's shape. height, width: of the latents. Raises `ValueError` unless they are multiples of `multiple`."""
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"height {height} or width {width} is not a multiple of {self.multiple}")
        sizes = {"frames": frames, "height": height, "width": width}
        return {name: tuple(_size(dim, sizes) for dim in dims) for name, dims in self.dims.items()}


def motion_call(unet: MotionUNet, halves: int = 1, controlled: bool = True) -> UNetCall:
    """A step of AnimateDiff. halves: 1, or 2 with guidance. controlled: whether SparseCtrl's residuals are inputs."""
    weight = unet.conv_in.weight
    levels = _levels(unet.down, unet.conv_in.out_channels)
    deepest = levels[-1][1]
    text_width: Any = next(m.to_k.in_features for m in unet.modules() if isinstance(m, CrossAttention))
    with torch.no_grad():
        context = unet.text_context(weight.new_zeros(halves, _TOKENS, text_width))
        time = unet.time_embeddings((0,))
    images: int | str = "frames" if halves == 1 else f"{halves}*frames"
    dims: dict[str, Dims] = {
        "latents": (halves, unet.conv_in.in_channels, "frames", "height", "width"),
        "time": tuple(time.shape),
    }
    dims |= {name: tuple(tensor.shape) for name, tensor in _context_inputs(context).items()}
    if controlled:
        shapes = [(images, channels, *_sides(ratio)) for channels, ratio in (*levels, (levels[-1][0], deepest))]
        dims |= _residual_names(shapes)
    return UNetCall(_MotionCall(unet, len(context)), _example(dims, weight, deepest), dims, deepest)


def svd_call(unet: SVDUNet, controlled: bool = True) -> UNetCall:
    """One window in one half of ControlNeXt. controlled: whether the control's maps are an input (the conditional half)."""
    weight = unet.conv_in.weight
    levels = _levels(unet.down, unet.conv_in.out_channels)
    image_width: Any = next(m.cross_v.in_features for m in unet.modules() if isinstance(m, SelfAttention))
    with torch.no_grad():
        half = unet.guidance_half(weight.new_zeros(unet.latent_channels, 1, 1), weight.new_zeros(1, image_width))
        (time,) = unet.time_biases((0.0,), (0.0, 0.0, 0.0))
    full = _sides(1)
    dims: dict[str, Dims] = {
        "latents": ("frames", unet.latent_channels, *full),
        "image": (1, unet.conv_in.out_channels, *full),
    }
    dims |= {name: tuple(t.shape) for name, t in (*_numbered("context", half.context), *_numbered("time", time))}
    if controlled:
        first: Any = unet.down[0]
        trunk = len(first.resnets)  # the skip of the first downsampler, behind conv_in's and the resnets'
        channels, ratio = levels[trunk + 1] if first.downsampler is not None else levels[trunk]
        dims |= {"control": ("frames", channels, *_sides(ratio)), "control_scale": (1,)}
    deepest = levels[-1][1]
    return UNetCall(_SVDCall(unet, len(half.context), len(time)), _example(dims, weight, deepest), dims, deepest)


def motion_inputs(latents: Tensor, time: Tensor, context: TextContext, residuals: Residuals | None = None) -> dict[str, Tensor]:
    """The arguments of `MotionUNet.forward` by the graph's names."""
    inputs = {"latents": latents, "time": time, **_context_inputs(context)}
    return inputs if residuals is None else inputs | _residual_names([*residuals.skips, residuals.mid])


def svd_inputs(latents: Tensor, half: Half, time: Biases, control: Control | None = None) -> dict[str, Tensor]:
    """The arguments of `SVDUNet.forward` by the graph's names."""
    inputs = {"latents": latents, "image": half.image}
    inputs |= dict((*_numbered("context", half.context), *_numbered("time", time)))
    return inputs if control is None else inputs | {"control": control.maps, "control_scale": latents.new_tensor([control.scale])}


def export_onnx(call: UNetCall, path: Path) -> None:
    """Writes the graph, in opset 23 and with attention as `Attention`; above 2 GB its weights lie in a file beside it."""
    import onnx_ir  # these two are of the extra rtx: a service that only runs engines has not got them
    from onnxscript import optimizer

    auto = torch.export.Dim.AUTO  # of SVD a named number of frames is refused: a guard that the solver cannot discharge
    dynamic = [{i: auto for i, dim in enumerate(call.dims[name]) if isinstance(dim, str)} for name in call.example]
    with torch.no_grad():
        traced = torch.export.export(call.module, tuple(call.example.values()), dynamic_shapes=(tuple(dynamic),), strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(call.example),
            output_names=[OUTPUT],
            verbose=False,
            optimize=False,
        )
    assert program is not None
    # needed: a chunk is a SplitToSequence before, which TensorRT does not read. Once is enough; the exporter's own goes twice
    optimizer.optimize(program.model, num_iterations=1)
    graph = program.model.graph
    # the exporter gives every dimension a name of its own; equal names tell TensorRT which are equal
    for value in graph.inputs:
        value.shape = onnx_ir.Shape(call.dims[str(value.name)])
    graph.outputs[0].shape = onnx_ir.Shape(call.dims["latents"])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    program.save(str(path))


class _MotionCall(nn.Module):
    def __init__(self, unet: MotionUNet, num_attentions: int):
        super().__init__()
        self.unet, self.num_attentions = unet, num_attentions

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, time, *rest = inputs
        split = 2 * self.num_attentions
        context: list[KeyValue] = list(zip(rest[:split:2], rest[1:split:2], strict=True))
        residuals = Residuals(tuple(rest[split:-1]), rest[-1]) if len(rest) > split else None
        return self.unet(latents, time, context, residuals)


class _SVDCall(nn.Module):
    def __init__(self, unet: SVDUNet, num_contexts: int, num_times: int):
        super().__init__()
        self.unet, self.num_contexts, self.num_times = unet, num_contexts, num_times

    def forward(self, *inputs: Tensor) -> Tensor:
        latents, image, *rest = inputs
        context, rest = rest[: self.num_contexts], rest[self.num_contexts :]
        time, rest = rest[: self.num_times], rest[self.num_times :]
        control = Control(rest[0], rest[1]) if rest else None  # type: ignore[arg-type]  # a number that may change
        return self.unet(latents, Half(image, context), time, control)


def _levels(down: nn.ModuleList, entry: int) -> list[tuple[int, int]]:
    """(channels, how often the latents' size is divided) of every skip tensor."""
    levels, ratio = [(entry, 1)], 1
    for block in down:
        levels += [(_width(resnet), ratio) for resnet in block.resnets]  # type: ignore[union-attr]
        if (downsampler := block.downsampler) is not None:
            ratio *= 2
            levels.append((downsampler.conv.out_channels, ratio))  # type: ignore[union-attr, arg-type]
    return levels


def _width(resnet: nn.Module) -> int:
    """The channels that a resnet of either family gives."""
    convs: Any = getattr(resnet, "spatial", resnet)
    width: int = convs.conv2.out_channels
    return width


def _context_inputs(context: TextContext) -> dict[str, Tensor]:
    return {f"{kind}_{i}": t for i, pair in enumerate(context) for kind, t in zip(("key", "value"), pair, strict=True)}


def _residual_names(residuals: Sequence[T]) -> dict[str, T]:
    return {**dict(_numbered("skip", residuals[:-1])), "mid": residuals[-1]}


def _numbered(name: str, values: Sequence[T]) -> list[tuple[str, T]]:
    return [(f"{name}_{i}", value) for i, value in enumerate(values)]


def _sides(ratio: int) -> tuple[str, str]:
    return ("height", "width") if ratio == 1 else (f"height/{ratio}", f"width/{ratio}")


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    """The number that a dimension is."""
    if isinstance(dim, int):
        return dim
    if "*" in dim:
        factor, _, name = dim.partition("*")
        return int(factor) * sizes[name]
    name, _, divisor = dim.partition("/")
    return sizes[name] // int(divisor or 1)


def _example(dims: Mapping[str, Dims], like: Tensor, multiple: int) -> dict[str, Tensor]:
    """Small tensors of the right kind. Height and width differ, or the exporter takes them for one."""
    sizes = {"frames": _TRACED, "height": 4 * multiple, "width": 6 * multiple}
    shapes = {name: tuple(_size(dim, sizes) for dim in shape) for name, shape in dims.items()}
    return {name: torch.linspace(0, 1, math.prod(shape)).reshape(shape).to(like) for name, shape in shapes.items()}
