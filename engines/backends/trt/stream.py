"""The stream on which an engine enqueues its work: a CUDA stream of its own, which can also record work and replay it.

It is separate from the engine, so that the rest of the engine can be tested without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

Launch = Callable[[], None]
"""Enqueues work."""


class Stream(Protocol):
    """device: of the buffers. handle: the `cudaStream_t` as a number, as libraries take it."""

    device: torch.device
    handle: int

    def entered(self) -> AbstractContextManager[None]:
        """Work enqueued within runs after all that the caller has enqueued before, and before all that it enqueues later."""
        ...

    def captured(self, launch: Launch) -> Launch:
        """Repeats what `launch` enqueues, at the same addresses. Calls `launch` twice, as its first run may initialise things."""
        ...

    def synchronize(self) -> None:
        """Returns when all enqueued work is done."""
        ...


class CudaStream:
    """A separate stream on a GPU. On the default stream TensorRT would add waits for the whole device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.handle = int(self._stream.cuda_stream)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """See `Stream`. Within, the stream's device is the current device."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def captured(self, launch: Launch) -> Launch:
        """See `Stream`. Records a CUDA graph. Raises `RuntimeError` if `launch` does something that a graph cannot contain."""
        launch()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # restricts only this thread's calls: other threads may allocate meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()
        return graph.replay

    def synchronize(self) -> None:
        """See `Stream`."""
        self._stream.synchronize()
