"""A function of tensors recorded once and replayed: the thousand launches of a UNet call become one.

PyTorch's "reduce-overhead" does the same, but decides by itself when to record again, and the next call overwrites its outputs.
CUDA graphs: the toolkit's Programming Guide, chapter of that name.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engines.backends.fixed_inputs import FixedInputs

Pool = tuple[int, int]
"""Memory that several graphs use in turn, of `torch.cuda.graph_pool_handle`."""

_WARM_UPS = 3
"""Calls before the recording, in which libraries choose their algorithms and allocate their workspaces: PyTorch's advice."""


class GraphedCall:
    """A function at fixed addresses, recorded on the current device.

    function: of the inputs in order; it must launch the same work whatever the values are, and must not wait for the device.
    inputs: on the device; these tensors become the buffers that every call's inputs are copied into. pool: shared with
    graphs that never run at the same time as this one; without it the graph has memory of its own.

    A call runs on the current stream. Weights that the function uses may change their values but not their addresses.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], pool: Pool | None = None):
        self._inputs = FixedInputs(inputs)
        self._function = function  # the graph knows its weights by address only
        buffers = list(self._inputs.tensors.values())
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(
            side
        ):  # the stream of the recording: what is created at first use on another stream cannot be recorded
            for _ in range(_WARM_UPS):
                function(*buffers)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": GPU work of other threads is not captured and must not fail
        with torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local"):  # type: ignore[arg-type]  # a private name
            self._output = function(*buffers)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output as a tensor of its own. Raises `ValueError` for names or shapes that are not the recorded ones."""
        self._inputs.fill(inputs)
        self._graph.replay()
        return self._output.clone()  # the next replay of any graph of the pool overwrites it
