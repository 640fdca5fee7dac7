"""The process in which Triton's kernels run as Python: `TRITON_INTERPRET` must be set before a kernel's module is imported."""

import os
from typing import Any


def start() -> None:
    """Initialises the process, before any kernel is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder

    torch.set_num_threads(1)
    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Converts bfloat16 first: the interpreter stores it as uint16, and its dot (triton 3.7.1) multiplies the integers."""
        a, b = (self.cast_impl(x, language.float32) if x.dtype.scalar == language.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
