"""A UNet's call as an ONNX graph, one for every number of frames, height and width, with attention in one operator.

`tensorrt-triton.md`, section 4.
"""

from pathlib import Path

import torch

from engines.unet_call import UNetCall

OPSET = 23
"""The first with `Attention`; below it SDPA falls apart into MatMul and Softmax, and TensorRT sees twice the layers."""

OUTPUT = "output"
"""The graph's one output."""


def export_onnx(call: UNetCall, path: Path) -> None:
    """Writes the graph, in opset 23 and with attention as `Attention`; above 2 GB its weights lie in a file beside it."""
    import onnx_ir  # these two are of the extras gpu and rtx: a service on a CPU has not got them
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
