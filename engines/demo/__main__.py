"""`python -m engines.demo`: trains the demo models and writes their checkpoints. `make demo-weights` runs it.

Both models train at once, each in a process of one thread at the lowest priority. It may be killed at any time: the next run
goes on from the last state written, at most two minutes before.
"""

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from engines.demo.stages import train_animatediff, train_controlnext

MODELS = {"animatediff": train_animatediff, "controlnext": train_controlnext}


def main() -> int:
    """Trains one model, or starts a process for each. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engines.demo", description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, help="the only one to train")
    parser.add_argument("--folder", type=Path, default=Path("demo-training"), help="keeps states, curves and sample sheets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="gets a folder a model")
    parser.add_argument("--device", default="cpu", help="cuda, to train on a GPU; not tried yet")
    options = parser.parse_args()
    if options.model is None:
        command = [
            sys.executable,
            "-m",
            "engines.demo",
            "--folder",
            str(options.folder),
            "--out",
            str(options.out),
            "--device",
            options.device,
        ]
        processes = [subprocess.Popen([*command, model]) for model in MODELS]
        return max(process.wait() for process in processes)
    _yield_to_others()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    MODELS[options.model](options.folder, options.out / options.model, logging.getLogger("engines.demo").info, options.device)
    return 0


def _yield_to_others() -> None:
    """Run only when no other process wants the core."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(main())
