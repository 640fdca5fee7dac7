"""An ONNX file as a function of one array. When it is loaded, its shapes are checked against those that the caller expects."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.errors import WeightsError

logger = logging.getLogger(__name__)

Array = NDArray[np.float32]
Shape = tuple[int, ...]


class OnnxNet:
    """One ONNX model with one float32 input. Several threads may call it at once: ONNX Runtime's `run` allows it.

    device: "cpu", "cuda" or "cuda:1"; the CPU is used if ONNX Runtime was built without CUDA. threads: of one call; None is
    one per core. Raises `WeightsError` if the file is absent, is not an ONNX model, or has other shapes than `takes` and
    `gives`; a dimension that the file leaves open matches any number.
    """

    def __init__(self, path: Path, takes: Shape, gives: Sequence[Shape], device: str = "cpu", threads: int | None = None):
        if not path.is_file():
            raise WeightsError(f"{path} does not exist; the pose nets are DWPose's two ONNX files")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3  # errors only: ONNX Runtime writes to stderr, not to our log
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads give up their cores
        try:
            self._session = ort.InferenceSession(os.fspath(path), options, providers=_providers(device))
        except Exception as exc:  # ONNX Runtime's errors share no base class of their own
            raise WeightsError(f"{path} cannot be loaded as an ONNX model: {exc}") from exc
        if device.startswith("cuda") and "CUDAExecutionProvider" not in self._session.get_providers():
            logger.warning(
                "the pose net runs on the CPU: this ONNX Runtime has no CUDA; install onnxruntime-gpu",
                extra={"action": "pose_on_cpu", "model": path.name},
            )
        self._path, self._gives = path, list(gives)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._check("inputs", [(node.type, node.shape) for node in inputs], [takes])
        self._check("outputs", [(node.type, node.shape) for node in outputs], self._gives)
        self._input = inputs[0].name

    def __call__(self, values: Array) -> list[Array]:
        """The outputs for one input, batch of one. Raises `WeightsError` if their shapes are not `gives`."""
        outputs: list[Array] = self._session.run(None, {self._input: values})
        self._check("outputs", [("tensor(float)", list(output.shape)) for output in outputs], self._gives)
        return outputs

    def _check(self, which: str, found: list[tuple[str, list[int | str | None]]], wanted: list[Shape]) -> None:
        fits = len(found) == len(wanted) and all(
            kind == "tensor(float)" and _fits(shape, want) for (kind, shape), want in zip(found, wanted, strict=True)
        )
        if not fits:
            seen = ", ".join(f"{kind} {shape}" for kind, shape in found)
            raise WeightsError(f"{self._path}: its {which} are {seen} instead of float {', '.join(map(str, wanted))}")


def _fits(shape: list[int | str | None], want: Shape) -> bool:
    """Whether the shape matches. An open dimension has a name or None instead of a number."""
    return len(shape) == len(want) and all(not isinstance(n, int) or n == m for n, m in zip(shape, want, strict=True))


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    kind, _, index = device.partition(":")
    if kind == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index or "0"}))
    return providers
