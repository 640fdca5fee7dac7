"""A real image and a real video through ControlNeXt's three stages at the API's default size, each stage in its own process.

    python -m tests.load.real_pair IMAGE VIDEO [--steps 25] [--out clip.mp4]

Weights are the demo's, and the pose models always return one fixed skeleton, so the rendered picture means nothing. Sizes,
frame count, frame rate, memory and time per stage are meaningful. Run by hand: we may not store the media.
"""

import argparse
import io
import multiprocessing
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import av
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from engines.controlnext.config import DETECTOR_FILE, POSE_FILE, ControlNeXtConfig, ControlNeXtWeights
from engines.controlnext.demo_weights import write_demo_weights
from engines.controlnext.spec import ControlNeXtSpec
from engines.registry import build_stage
from engines.spec import Progress
from tests.load.report import table

BINS_X, BINS_Y, POINTS = 576, 768, 133


def write_fixed_pose(folder: Path) -> None:
    """Writes ONNX files with DWPose's signatures. Nobody is detected, so the box is the whole frame; its points are fixed."""
    generator = np.random.default_rng(0)
    x, y = (generator.integers(bins // 4, 3 * bins // 4, POINTS) for bins in (BINS_X, BINS_Y))
    simcc_x, simcc_y = np.zeros((1, POINTS, BINS_X), np.float32), np.zeros((1, POINTS, BINS_Y), np.float32)
    simcc_x[0, np.arange(POINTS), x] = simcc_y[0, np.arange(POINTS), y] = 1.0
    write_constants(folder / DETECTOR_FILE, "images", (1, 3, 640, 640), {"output": np.zeros((1, 8400, 85), np.float32)})
    write_constants(folder / POSE_FILE, "input", (1, 3, 384, 288), {"simcc_x": simcc_x, "simcc_y": simcc_y})


def write_constants(path: Path, name: str, shape: tuple[int, ...], outputs: dict[str, np.ndarray]) -> None:
    given = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    gives = [helper.make_tensor_value_info(output, TensorProto.FLOAT, value.shape) for output, value in outputs.items()]
    nodes = [
        helper.make_node("Constant", [], [output], value=numpy_helper.from_array(value)) for output, value in outputs.items()
    ]
    graph = helper.make_graph(nodes, "fixed", [given], gives)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def run_stage(
    stage: Literal["preprocess", "denoise", "decode"], config: ControlNeXtConfig, given: Any
) -> tuple[Any, float, float]:
    """The stage's product, its seconds without loading, and the peak memory of its process in bytes."""
    loaded: Any = build_stage("controlnext", stage, config)

    def tell(progress: Progress) -> None:
        Console(stderr=True).print(f"{stage}: {progress.unit} {progress.done}/{progress.total}")

    started = time.monotonic()
    if stage == "preprocess":
        product = loaded.encode(given, on_progress=tell)
    elif stage == "denoise":
        product = loaded.sample(given, on_step=lambda step: tell(Progress("step", step.step, step.steps)))
    else:
        product = loaded.decode(given, on_progress=tell)
    return product, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    console = Console()
    shown = table(f"{asked.steps} steps, all else the API's defaults", "stage", "seconds", "peak MB")
    with TemporaryDirectory(prefix="reelray-") as folder:
        weights: ControlNeXtWeights = write_demo_weights(Path(folder) / "controlnext")
        assert weights.pose.folder is not None
        write_fixed_pose(weights.pose.folder)
        config = ControlNeXtConfig(weights=weights)
        product: Any = ControlNeXtSpec(42, asked.steps, 3.0, asked.image, asked.video)
        for stage in ("preprocess", "denoise", "decode"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                product, seconds, peak = pool.apply(run_stage, (stage, config, product))
            shown.add_row(stage, f"{seconds:.1f}", f"{peak / 1e6:.0f}")
            if stage == "denoise":
                console.print(f"latents {tuple(product.values.shape)}, finite: {bool(product.values.isfinite().all())}")
    console.print(shown)
    with av.open(io.BytesIO(product.mp4), "r") as container:
        stream = container.streams.video[0]
        count = sum(1 for _ in container.decode(video=0))
        console.print(f"{stream.width}x{stream.height}, {count} frames at {stream.average_rate}, {len(product.mp4)} bytes")
    if asked.out:
        asked.out.write_bytes(product.mp4)


if __name__ == "__main__":
    main()
