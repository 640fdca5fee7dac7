"""A lap without Ray: the real stages, one row after the other, in the lap's own process."""

import json
import sys
import threading
from dataclasses import asdict

from deployments.batch.ray_data import end_with_driver
from deployments.batch.run_folder import Row
from deployments.batch.stages import STAGES, Work

if __name__ == "__main__":
    rows = [Row(**json.loads(line)) for line in iter(sys.stdin.readline, "\n")]
    threading.Thread(target=end_with_driver, daemon=True).start()
    stages = [stage(sys.argv[1]) for stage in STAGES]
    for row in rows:
        work = Work(row)
        for stage in stages:
            work = stage(work)
        assert work.record is not None
        sys.stdout.write(json.dumps(asdict(work.record)) + "\n")
        sys.stdout.flush()
