"""Runs a plan. Each shape that is called gets an execution context in the narrowest profile, and a CUDA graph.

A CUDA graph always uses the same addresses, so inputs are copied into the engine's buffers, and the result out of one. The
buffers are large enough for the largest family and serve all shapes. One block of memory holds all activations, as calls come
one at a time. So another context costs little. A context per shape is needed: TensorRT's guide forbids changing a context whose
work is in a graph, and another shape would change it. `tensorrt-triton.md`, section 5.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engines.backends.shapes import Shape, ShapeFamily
from engines.backends.trt.export import OUTPUT
from engines.backends.trt.inspection import Report, inspect
from engines.backends.trt.library import Messages, logger_of, note_faults, require_supported
from engines.backends.trt.profiles import Range, profile_of
from engines.backends.trt.stream import Launch, Stream
from engines.backends.unet_call import UNetCall
from engines.errors import EngineError

MAX_NAMES = 8
"""How many weights an error lists before it only counts."""

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}  # by their names in TensorRT's DataType


@dataclass(frozen=True)
class _Ready:
    """What a call of one shape needs: its tensors, which are the first part of each buffer, and what runs it on them."""

    inputs: Mapping[str, Tensor]
    output: Tensor
    launch: Launch


class TensorRTEngine:
    """An `Engine`. families: those that the plan was built for, in order. graphs: whether to record CUDA graphs.

    Raises `EngineError`, with the library's message if there is one, for an unsupported version, a plan that cannot be loaded,
    and a plan for another call or other families.
    """

    name = "tensorrt"

    def __init__(
        self,
        plan: bytes,
        library: ModuleType,
        call: UNetCall,
        families: Sequence[ShapeFamily],
        stream: Stream,
        graphs: bool = True,
    ):
        require_supported(library)
        trt: Any = library
        self.call = call
        self._trt, self._families, self._stream, self._graphs = trt, tuple(families), stream, graphs
        self._said = Messages()
        self._log = logger_of(library, self._said)
        self._contexts: dict[Shape, Any] = {}
        self._ready: dict[Shape, _Ready] = {}
        self._spoilt = False
        with torch.inference_mode(False), stream.entered():  # so that the buffers can be written in any mode
            with self._said.blamed_on("the runtime cannot be made"):
                self._runtime = trt.Runtime(self._log)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self._said.fault("the plan cannot be loaded")
            self._engine = engine
            dtypes = self._dtypes()
            self._check_profiles()
            largest = [self._shapes(family.largest) for family in self._families]
            sizes = {name: max(math.prod(shapes[name]) for shapes in largest) for name in dtypes}
            self._buffers = {name: torch.zeros(sizes[name], dtype=dtypes[name], device=stream.device) for name in dtypes}
            self._memory = torch.empty(engine.device_memory_size_v2, dtype=torch.uint8, device=stream.device)

    def holds(self, shape: Shape) -> bool:
        """See `Engine`."""
        halves = not (shape.height % self.call.multiple or shape.width % self.call.multiple)
        return halves and any(family.holds(shape) for family in self._families)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """See `Engine`. Raises `EngineError` for inputs that are not the call's, and for a failure of the library."""
        if self._spoilt:
            raise EngineError("an exchange of weights has failed half way: exchange them again, or load the plan anew")
        if inputs.keys() != self.call.dims.keys():
            raise EngineError(f"{self.call.name} takes {sorted(self.call.dims)}, not {sorted(inputs)}")
        shape = self.call.shape_of(inputs)
        if not self.holds(shape):
            raise EngineError(f"no profile of {self.call.name} holds {shape}")
        if shape not in self._ready:
            with self._stream.entered():
                self._ready[shape] = self._prepared(shape)
        ready = self._ready[shape]
        for name, own in ready.inputs.items():
            given = inputs[name]
            if given.shape != own.shape or given.dtype != own.dtype:  # a copy would broadcast and convert silently
                raise EngineError(f"{name} is {given.dtype} {tuple(given.shape)} instead of {own.dtype} {tuple(own.shape)}")
        result = torch.empty_like(ready.output)  # on the caller's stream: its memory is then reused in that stream's order
        with self._stream.entered():
            for name, own in ready.inputs.items():
                own.copy_(inputs[name])
            ready.launch()
            result.copy_(ready.output)
        return result

    def refit(self, graph: Path) -> None:
        """Puts in the weights of an ONNX file of the same call: those of another checkpoint, or with a LoRA folded in.

        Raises `EngineError` for a plan that was not built for it, and for a file that does not hold its weights. After the
        latter the engine refuses calls until a refit succeeds.
        """
        require_supported(self._trt, refit=True)
        trt = self._trt
        if not self._engine.refittable:
            raise EngineError("the plan was not built to be refitted")
        self._stream.synchronize()
        self._ready.clear()  # CUDA graphs hold the weights' addresses, which a refit may change
        self._spoilt = True
        with self._stream.entered():
            with self._said.blamed_on("the refitter cannot be made"):
                refitter = trt.Refitter(self._engine, self._log)
                parser = trt.OnnxParserRefitter(refitter, self._log)
            read = parser.refit_from_file(str(graph))
            missing = refitter.get_missing_weights()
            if missing or not read:
                note_faults(parser, self._said)
                names = ", ".join(missing[:MAX_NAMES])
                raise self._said.fault(f"{graph} does not fit the plan, {len(missing)} of whose weights are missing ({names})")
            if not refitter.refit_cuda_engine_async(self._stream.handle):
                raise self._said.fault(f"the weights of {graph} are refused")
            self._stream.synchronize()  # the parser's memory must live until the weights are read
        self._spoilt = False

    def inspect(self) -> Report:
        """What is in the engine. Layers have details if `BuildOptions.detailed` was set."""
        return inspect(self._trt, self._engine)

    def _dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each input and of the output. Raises `EngineError` unless the plan has exactly the call's tensors."""
        engine, modes = self._engine, self._trt.TensorIOMode
        found = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        expected = {name: (modes.INPUT, tensor.dtype) for name, tensor in self.call.example.items()}
        expected[OUTPUT] = (modes.OUTPUT, self.call.example["latents"].dtype)
        if absent := expected.keys() - set(found):
            raise EngineError(f"the plan lacks {sorted(absent)} of {self.call.name}")
        if strange := set(found) - expected.keys():
            raise EngineError(f"the plan has {sorted(strange)}, which {self.call.name} has not")
        for name, (mode, dtype) in expected.items():
            if engine.get_tensor_mode(name) != mode:
                raise EngineError(f"{name} is no {mode.name} of the plan")
            if _DTYPES.get(engine.get_tensor_dtype(name).name) != dtype:
                raise EngineError(f"{name} is {engine.get_tensor_dtype(name).name} in the plan, and {dtype} in {self.call.name}")
        return {name: dtype for name, (_, dtype) in expected.items()}

    def _check_profiles(self) -> None:
        count = self._engine.num_optimization_profiles
        if count != len(self._families):
            raise EngineError(f"the plan has {count} profiles for {len(self._families)} families")
        for i, family in enumerate(self._families):
            for name, expected in profile_of(self.call, family).items():
                found = Range(*(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, i)))
                if found != expected:
                    raise EngineError(f"{name} is {found} in the plan's profile {i}, and {expected} in {family}")

    def _shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs and of the output."""
        shapes = self.call.shapes(shape)
        return shapes | {OUTPUT: shapes["latents"]}

    def _prepared(self, shape: Shape) -> _Ready:
        views = {name: self._buffers[name][: math.prod(size)].view(size) for name, size in self._shapes(shape).items()}
        if shape not in self._contexts:
            self._contexts[shape] = self._context(shape)
        execute = partial(self._execute, self._contexts[shape], shape)
        output = views.pop(OUTPUT)
        if not self._graphs:
            return _Ready(views, output, execute)
        with self._said.blamed_on(f"{self.call.name} at {shape} cannot be recorded"):
            return _Ready(views, output, self._stream.captured(execute))

    def _narrowest(self, shape: Shape) -> int:
        """The profile that holds this shape and the fewest others."""
        return min((i for i, f in enumerate(self._families) if f.holds(shape)), key=lambda i: _breadth(self._families[i]))

    def _context(self, shape: Shape) -> Any:
        """A context with fixed profile, shapes and addresses."""
        strategy = self._trt.ExecutionContextAllocationStrategy
        context = self._engine.create_execution_context(strategy.USER_MANAGED)
        if context is None:
            raise self._said.fault(f"no context can be made for {self.call.name}")
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        profile = self._narrowest(shape)
        if not context.set_optimization_profile_async(profile, self._stream.handle):
            raise self._said.fault(f"profile {profile} of {self.call.name} is refused")
        for name, size in self.call.shapes(shape).items():
            if not context.set_input_shape(name, size):
                raise self._said.fault(f"{name} of {size} is refused")
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise self._said.fault(f"the buffer of {name} is refused")
        made = tuple(context.get_tensor_shape(OUTPUT))
        if made != self._shapes(shape)[OUTPUT]:
            raise EngineError(f"the output is {made} instead of {self._shapes(shape)[OUTPUT]}")
        return context

    def _execute(self, context: Any, shape: Shape) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise self._said.fault(f"{self.call.name} at {shape} has failed")


def _breadth(family: ShapeFamily) -> int:
    """How many shapes a family holds."""
    return math.prod(getattr(family.largest, f.name) - getattr(family.smallest, f.name) + 1 for f in fields(Shape))
