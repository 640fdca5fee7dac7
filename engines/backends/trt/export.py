"""Exports a UNet's call as an ONNX graph. One graph serves every number of frames, height and width; attention is one operator.

Attention over frames can be our own node instead, for `plugin.py`; then the graph is for one number of frames.
`tensorrt-triton.md`, sections 4 and 5.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kernels.temporal_attention  # noqa: F401  (its operation is looked up by name)
from engines.backends.unet_call import UNetCall
from kernels.choice import plugins as kept

OPSET = 23
"""The first opset with `Attention`. In older ones SDPA becomes MatMul and Softmax, and TensorRT gets twice the layers."""

OUTPUT = "output"
"""The name of the graph's only output."""

DOMAIN = "reelray"
"""The ONNX domain of our nodes, and TensorRT's namespace for our plugins."""

TEMPORAL, TEMPORAL_WITH_TABLE = "ReelrayTemporalAttention", "ReelrayTemporalAttentionWithTable"
"""`reelray::temporal_attention` without and with a position table, as a plugin has no optional inputs. The names must not be
names of ONNX operators: TensorRT takes such a node for ONNX's, whatever its domain."""

PLUGINS = frozenset({"temporal_attention"})
"""Our operations that can stay nodes of the graph."""


def export_onnx(call: UNetCall, path: Path, plugins: Sequence[str] = (), frames: int = 0) -> None:
    """Writes the graph, in opset 23 and with attention as `Attention`; above 2 GB its weights are in a file beside it.

    plugins: those of `PLUGINS` that stay our nodes. The graph is then right only for calls with `frames` frames. The inputs'
    dimensions do not show this, so the code that builds the graph must ensure it.
    """
    import onnx_ir  # these two come with the extras gpu and rtx: a service on a CPU does not have them
    from onnxscript import optimizer

    auto = torch.export.Dim.AUTO  # a named frame dimension fails for SVD: the solver cannot prove one of its guards
    dynamic = [{i: auto for i, dim in enumerate(call.dims[name]) if isinstance(dim, str)} for name in call.example]
    # PyTorch's cache of shapes costs more than it saves where the shapes are symbols: a fifth of the export
    uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with torch.no_grad(), kept(plugins), uncached:
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
    # needed: it replaces `chunk`'s SplitToSequence, which TensorRT cannot read. Once is enough; the exporter would do it twice
    optimizer.optimize(program.model, num_iterations=1)
    graph = program.model.graph
    # the exporter gives every dimension a different name; equal names show TensorRT which dimensions are equal
    for value in graph.inputs:
        value.shape = onnx_ir.Shape(call.dims[str(value.name)])
    graph.outputs[0].shape = onnx_ir.Shape(call.dims["latents"])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    program.save(str(path))


def _translations(plugins: Sequence[str], frames: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operation -> the function with which the exporter writes it."""
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
    """Registers our nodes with ONNX: the exporter writes only nodes that ONNX knows."""
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
