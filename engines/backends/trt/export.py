"""A UNet's call as an ONNX graph, one for every number of frames, height and width, with attention in one operator.

Attention over frames can be a node of ours instead, for `plugin.py`; then the graph is for one number of frames.
`tensorrt-triton.md`, sections 4 and 5.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kernels.temporal_attention  # noqa: F401  (its operation is asked for by name)
from engines.backends.unet_call import UNetCall
from kernels.choice import plugins as kept

OPSET = 23
"""The first with `Attention`; below it SDPA falls apart into MatMul and Softmax, and TensorRT sees twice the layers."""

OUTPUT = "output"
"""The graph's one output."""

DOMAIN = "reelray"
"""Of our nodes, and TensorRT's namespace of our plugins."""

TEMPORAL, TEMPORAL_WITH_TABLE = "ReelrayTemporalAttention", "ReelrayTemporalAttentionWithTable"
"""`reelray::temporal_attention` without and with a table of positions: a plugin cannot lack an input. The names must be nobody
else's: TensorRT takes one that ONNX has for ONNX's own, whatever its domain."""

PLUGINS = frozenset({"temporal_attention"})
"""Operations of ours that can stay nodes."""


def export_onnx(call: UNetCall, path: Path, plugins: Sequence[str] = (), frames: int = 0) -> None:
    """Writes the graph, in opset 23 and with attention as `Attention`; above 2 GB its weights lie in a file beside it.

    plugins: those of `PLUGINS` that stay nodes of ours, for calls with so many frames and no others: the inputs' dimensions are
    named as always, and who builds the graph must see to it.
    """
    import onnx_ir  # these two are of the extras gpu and rtx: a service on a CPU has not got them
    from onnxscript import optimizer

    auto = torch.export.Dim.AUTO  # of SVD a named number of frames is refused: a guard that the solver cannot discharge
    dynamic = [{i: auto for i, dim in enumerate(call.dims[name]) if isinstance(dim, str)} for name in call.example]
    with torch.no_grad(), kept(plugins):
        traced = torch.export.export(call.module, tuple(call.example.values()), dynamic_shapes=(tuple(dynamic),), strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(call.example),
            output_names=[OUTPUT],
            custom_translation_table=_translations(plugins, frames),
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


def _translations(plugins: Sequence[str], frames: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes these operations."""
    if not plugins:
        return {}
    assert PLUGINS.issuperset(plugins), plugins
    assert frames > 0, "a plugin is for a number of frames"
    from onnxscript.values import Opset

    _register_schemas()
    ours: Any = Opset(DOMAIN, 1)
    found_by = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}

    def temporal_attention(qkv: Any, num_frames: Any, heads: int, position: Any = None) -> Any:
        assert not isinstance(num_frames, int) or num_frames == frames, "a call has one number of frames"
        attributes = {"frames_and_heads": [frames, heads], **found_by}
        if position is None:
            return getattr(ours, TEMPORAL)(qkv, **attributes)
        return getattr(ours, TEMPORAL_WITH_TABLE)(qkv, position, **attributes)

    return {torch.ops.reelray.temporal_attention.default: temporal_attention}


def _register_schemas() -> None:
    """Makes ONNX know our nodes: the exporter writes no others."""
    from onnx import defs

    schema = defs.OpSchema
    types = schema.AttrType
    kinds = {"frames_and_heads": types.INTS, "plugin_namespace": types.STRING, "plugin_version": types.STRING, "aot": types.INT}
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"]
    for name, inputs in ((TEMPORAL, ("qkv",)), (TEMPORAL_WITH_TABLE, ("qkv", "position"))):
        if not defs.has(name, DOMAIN):
            defs.register_schema(
                schema(
                    name,
                    DOMAIN,
                    1,
                    inputs=[schema.FormalParameter(item, "T") for item in inputs],
                    outputs=[schema.FormalParameter("out", "T")],
                    type_constraints=[("T", floats, "")],
                    attributes=[schema.Attribute(key, kind) for key, kind in kinds.items()],
                )
            )
