"""Stands in for TensorRT in its own process: asks the cache for one plan, and writes a note whenever it really builds.

Arguments: the cache's folder, a file for the notes, how long a build takes in seconds, "die" to be killed in the middle.
"""

import os
import signal
import sys
import time
from pathlib import Path

from engines.backends.trt.cache import PlanCache
from tests.engines.backends.trt.keys import KEY, PLAN


def main(folder: str, notes: str, seconds: str, mode: str) -> None:
    def fake_build() -> bytes:
        with Path(notes).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(float(seconds))
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return PLAN

    sys.exit(0 if PlanCache(Path(folder)).get(KEY, fake_build) == PLAN else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
