"""`reelray demo-weights` and `convert-weights`: checkpoints on this machine's disk."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from deployments.cli.shared import clear_errors, console, print_line


def demo_weights(folder: Annotated[Path, typer.Argument(file_okay=False)]) -> None:
    """Write tiny demo checkpoints of every model, laid out like the real ones, and inputs to try them with."""
    from deployments.hosting.demo_weights import write_demo

    write_demo(folder)
    print_line(folder)


def convert_weights(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A pickle of tensors: .bin, .pth, .ckpt.")],
    target: Annotated[Path, typer.Argument(dir_okay=False, help="The .safetensors file to write.")],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None, typer.Option(help="Data type to store; unchanged by default.")
    ] = None,
) -> None:
    """Convert a published pickle to safetensors, without executing any code in it."""
    from engines.checkpoints.convert import convert_weights

    with clear_errors():
        tensors = convert_weights(source, target, dtype)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    console.print(f"{target}: {len(tensors)} tensors, {parameters / 1e6:.2f} M parameters", soft_wrap=True, highlight=False)
