"""Where an engine's work is enqueued: a CUDA stream of its own, and what it can record to repeat in one launch.

Apart from the engine, so that the rest of it is tested where there is no GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

Launch = Callable[[], None]
"""Enqueues work."""


class Stream(Protocol):
    """device: of the buffers. handle: the `cudaStream_t` as a number, which libraries take."""

    device: torch.device
    handle: int

    def entered(self) -> AbstractContextManager[None]:
        """What is enqueued within comes after all that the caller has enqueued, and before all that it will."""
        ...

    def captured(self, launch: Launch) -> Launch:
        """Repeats what `launch` enqueues, with the same addresses. Calls it twice: a first run may set things up."""
        ...

    def synchronize(self) -> None:
        """Returns when all that was enqueued is done."""
        ...


class CudaStream:
    """A stream of its own on a GPU. TensorRT adds waits for the whole device to work on the default stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.handle = int(self._stream.cuda_stream)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """See `Stream`. The stream's device is the current one within."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def captured(self, launch: Launch) -> Launch:
        """See `Stream`. A CUDA graph; raises `RuntimeError` if what `launch` does cannot be in one."""
        launch()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # only this thread's calls are watched: others of the process may allocate meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    def synchronize(self) -> None:
        """See `Stream`."""
        self._stream.synchronize()
