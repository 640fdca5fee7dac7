"""One lap of a run: Ray Data streams a few thousand rows through the three stages, each a pool of actors with its model loaded.

    python -m deployments.batch.ray_data <the run's folder> [--alone]

It reads the rows from its input, up to an empty line, and prints the record of each as it ends. The driver runs it as a process
of its own: Ray Data keeps about 10 kB for every row that it has seen, also between two runs in one process (Ray 2.60), so a
run of 100,000 rows would take a gigabyte. It may also die without harm: what it has not finished is in the next lap.

A row is a block, so a row whose actor dies takes only itself and the one that waits at that actor along. Ray Data drops both, and
they are done in a lap of their own, each alone at its actor (`--alone`).
"""

import json
import logging
import os
import sys
import threading
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset

from deployments.batch.run_folder import Row, Run, RunFolder
from deployments.batch.stages import STAGES, RowStage, Work

Stages = tuple[type[RowStage], ...]

ACTOR_CPUS = 0.1
"""An actor's share of a node's CPUs, in Ray's books. Its threads are what the model's config says."""
OBJECT_STORE_BYTES = 1_000_000_000
"""Of an embedded Ray; see `hosting/local_cluster.py`."""


def stream(run: Run, url: str, rows: list[Row], stages: Stages, *, alone: bool) -> Dataset:
    """The rows' way through the stages: a dataset with a column `work`, one row a block."""
    context = DataContext.get_current()
    context.max_errored_blocks = -1  # a row that is lost with its actor does not end the others
    context.enable_progress_bars = False
    data = ray.data.from_items([{"work": Work(row)} for row in rows], override_num_blocks=len(rows))
    for stage in stages:
        pool = run.pools[stage.name]
        data = data.map_batches(
            _Actor,
            fn_constructor_args=(stage, url),
            batch_size=None,
            compute=ActorPoolStrategy(min_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=1 if alone else 2),
            num_cpus=ACTOR_CPUS,
            num_gpus=pool.gpus or None,
            max_restarts=-1,
            max_task_retries=1 if alone else 0,
        )
    return data


class _Actor:
    """What Ray Data calls with a block: a stage."""

    def __init__(self, stage: type[RowStage], url: str):
        self.stage = stage(url)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"work": [self.stage(work) for work in block["work"]]}


def main(stages: Stages = STAGES) -> None:
    """See above."""
    url, *options = sys.argv[1:]
    rows = [Row(**json.loads(line)) for line in iter(sys.stdin.readline, "\n")]
    threading.Thread(target=end_with_driver, daemon=True).start()
    with os.fdopen(os.dup(1), "w") as records:
        os.dup2(2, 1)  # what libraries print is no record
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        address = os.environ.get("RAY_ADDRESS") or "local"  # set in a Ray job
        embedded: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        place = embedded if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **place)
        data = stream(RunFolder(url).run(), url, rows, stages, alone="--alone" in options)
        for block in data.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for work in block["work"]:
                records.write(json.dumps(asdict(work.record)) + "\n")
                records.flush()


def end_with_driver() -> None:
    """The driver holds our input open for as long as it lives. Without it, another one may render the same rows."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
