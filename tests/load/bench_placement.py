"""Which placement of the stages finishes more jobs: a few jobs one by one, then many at once.

With `--url` it measures a service that runs somewhere, with whichever configuration it has:

    python -m tests.load.bench_placement --url URL --key KEY --endpoint fal-ai/controlnext --input job.json --gpus 4

Without it, it starts one here on the demo weights, with one torch thread a process, and compares two placements of the same
processes on two cores, in turns: "shared" lets them all use both, as fractions of a GPU do; "apart" gives the first core to
denoising and the second to everything else, as pools do.

"cost" is how much longer a stage works on a job among others than alone. "at once" is from the first submission to the last end.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from deployments.cli.client import QueueClient
from deployments.hosting.demo_weights import demo_inputs
from tests.e2e.service import Service
from tests.load.report import Report, percentile, table

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
STAGES = ("preprocess", "denoise", "decode")
ALONE, ROUNDS = 3, 3


@dataclass(frozen=True)
class Took:
    """A job. seconds: from its submission to its end. stages: stage -> the seconds that it worked."""

    seconds: float
    stages: dict[str, float]


@dataclass(frozen=True)
class Round:
    """alone: jobs one after the other. together: those at once, which took `at_once_s` in all."""

    alone: Sequence[Took]
    together: Sequence[Took]
    at_once_s: float

    @property
    def jobs_per_minute(self) -> float:
        return 60 * len(self.together) / self.at_once_s


class Caller:
    """Submits jobs that differ only in their seeds."""

    def __init__(self, url: str, key: str | None, endpoint: str, job_input: dict[str, Any]):
        self.url, self.key, self.endpoint, self.job_input = url, key, endpoint, job_input

    def job(self, seed: int) -> Took:
        """One job, from its submission to its end. Raises `AssertionError` if it failed."""
        began = time.monotonic()
        with QueueClient(self.url, self.key) as client:
            *_, last = client.follow(self.endpoint, client.submit(self.endpoint, self.job_input | {"seed": seed}))
        assert "error" not in last, last
        return Took(time.monotonic() - began, last["metrics"]["receipt"]["seconds"])

    def measure(self, jobs: int) -> Round:
        """A round, after one job that warms the service."""
        self.job(0)
        alone = [self.job(seed) for seed in range(ALONE)]
        began = time.monotonic()
        with ThreadPoolExecutor(jobs) as callers:
            together = list(callers.map(self.job, range(jobs)))
        return Round(alone, together, time.monotonic() - began)


def show(report: Report, rounds: dict[str, list[Round]], gpus: int | None) -> None:
    """gpus: of the service."""
    shown = table("Jobs", "placement", "alone s", "jobs a minute", *(["a GPU"] if gpus else []), "p95 at once s")
    for name, each in rounds.items():
        alone = statistics.median(took.seconds for one in each for took in one.alone)
        rate = statistics.median(one.jobs_per_minute for one in each)
        last = percentile([took.seconds for one in each for took in one.together], 95)
        shown.add_row(name, f"{alone:.2f}", f"{rate:.1f}", *([f"{rate / gpus:.1f}"] if gpus else []), f"{last:.1f}")
    report.add(shown)
    columns = [f"{stage} {of}" for stage in STAGES for of in ("alone s", "cost")]
    stages = table("Work of a stage on a job", "placement", *columns)
    for name, each in rounds.items():
        row = []
        for stage in STAGES:
            alone = statistics.median(took.stages[stage] for one in each for took in one.alone)
            beside = statistics.median(took.stages[stage] for one in each for took in one.together)
            row += [f"{alone:.3f}", f"{beside / alone:.2f}"]
        stages.add_row(name, *row)
    report.add(stages)
    report.add("Jobs a minute round by round: " + "; ".join(f"{name} {_rates(each)}" for name, each in rounds.items()) + ".")


def _rates(rounds: Sequence[Round]) -> str:
    return ", ".join(f"{each.jobs_per_minute:.1f}" for each in rounds)


@contextmanager
def started_here() -> Iterator[Service]:
    with TemporaryDirectory(prefix="reelray-placement-") as home:
        service = Service(Path(home), without=("controlnext",), added={"animatediff": {"threads": 1}})
        try:
            service.start()
            yield service
        finally:
            service.kill()


def bind(service: Service, *, apart: bool) -> None:
    """Binds every thread of the service to its core or, if not apart, to both."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert service.process is not None
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            own = {first} if "denoise" in " ".join(process.cmdline()).lower() else {second}
            for thread in process.threads():
                os.sched_setaffinity(thread.id, own if apart else {first, second})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a service that runs; without it one is started here")
    parser.add_argument("--key", help="an API key, if it wants one")
    parser.add_argument("--endpoint", default=ENDPOINT)
    parser.add_argument("--input", type=Path, help="the job's input as JSON; without it the demo's")
    parser.add_argument("--jobs", type=int, default=20, help="how many at once")
    parser.add_argument("--gpus", type=int, help="how many GPUs the service has")
    parser.add_argument("--save", action="store_true", help="write results/placement.md")
    given = parser.parse_args()
    report = Report("placement", "Placements of the stages", __doc__, "`make bench-placement`")
    rounds: dict[str, list[Round]] = {}
    if given.url is not None:
        job_input = json.loads(given.input.read_text()) if given.input else demo_inputs()[given.endpoint]
        rounds["this service"] = [Caller(given.url, given.key, given.endpoint, job_input).measure(given.jobs)]
    else:
        with started_here() as service:
            caller = Caller(service.url, None, ENDPOINT, demo_inputs()[ENDPOINT])
            for _ in range(ROUNDS):
                for name, apart in (("shared", False), ("apart", True)):
                    bind(service, apart=apart)
                    rounds.setdefault(name, []).append(caller.measure(given.jobs))
    show(report, rounds, given.gpus)
    return report.conclude((), save=given.save)


if __name__ == "__main__":
    raise SystemExit(main())
