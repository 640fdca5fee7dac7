"""What the service adds to a job: the same input through HTTP, queue, database and Ray, and rendered in this process.

Both take turns on the demo model with the same number of torch threads. Every job has another prompt, so that no cached
SparseCtrl results are used. A job ends when its status stream says COMPLETED; nothing polls. In this process a job is
`Pipeline.render`, from the keyframes' bytes to the mp4's. The times of the steps come from the database's timestamps and from
timers in the dispatcher (`timed.py`). "in queue" ends when the dispatcher has claimed the job. "close" is the rest of its
work, the commit, and the delivery of the event by the stream. "result" is the request for the output.
"""

import argparse
import json
import statistics
import time
from asyncio import run
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import httpx
import yaml

from deployments.files.download import download_all, download_folder
from deployments.hosting.demo_weights import demo_inputs
from deployments.hosting.embedded_postgres import database_url
from deployments.hosting.local_cluster import running
from deployments.jobs.job import Job
from deployments.jobs.store import JobStore
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings, load_settings
from engines.pipeline import Pipeline
from engines.spec import RenderSpec
from tests.e2e.service import free_port
from tests.load.report import Report, ms, percentile, table

ENDPOINT = ENDPOINTS["fal-ai/animatediff-sparsectrl-lcm"]
TARGET_MS = 150
JOBS = 40
WARM_UP = 3
AT_ONCE = 20
STAGES = ("preprocess", "denoise", "decode")
STEPS = ("submit", "in queue", *STAGES, "file", "close", "result")


@dataclass(frozen=True)
class Served:
    """A job as its caller saw it, in seconds since 1970."""

    id: UUID
    started: float
    completed: float
    answered: float


def job_input(take: int) -> dict[str, Any]:
    """Input number `take`: the demo's, with a prompt of its own."""
    return demo_inputs()[ENDPOINT.id] | {"prompt": f"a ball rolls across the table, take {take}"}


def spec_of(given: dict[str, Any], settings: Settings) -> RenderSpec:
    """The spec that the preprocess stage would make from an input."""
    job = ENDPOINT.input.parse(json.dumps(given).encode()).input.resolved()
    with download_folder() as folder:
        return job.spec(run(download_all(job.media(), settings.fetch, folder)))


def submit(client: httpx.Client, given: dict[str, Any]) -> str:
    response = client.post(f"/queue/{ENDPOINT.id}", json=given).raise_for_status()
    request_id: str = response.json()["request_id"]
    return request_id


def follow(client: httpx.Client, request_id: str) -> None:
    """Returns once its stream says that it is completed. Raises `AssertionError` if it failed."""
    with client.stream("GET", f"/queue/{ENDPOINT.id}/requests/{request_id}/status/stream") as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and (status := json.loads(line[6:]))["status"] == "COMPLETED":
                assert "error" not in status, status
                return
    raise AssertionError("the stream ended before the job")


def serve_job(client: httpx.Client, given: dict[str, Any]) -> Served:
    started = time.time()
    request_id = submit(client, given)
    follow(client, request_id)
    completed = time.time()
    client.get(f"/queue/{ENDPOINT.id}/requests/{request_id}").raise_for_status()
    return Served(UUID(request_id), started, completed, time.time())


def render(pipeline: Pipeline, spec: RenderSpec) -> dict[str, float]:
    """The seconds of each stage in this process."""
    times = [time.perf_counter()]
    conditioning = pipeline.preprocess.encode(spec)
    times.append(time.perf_counter())
    latents = pipeline.denoise.sample(conditioning)
    times.append(time.perf_counter())
    pipeline.decode.decode(latents)
    times.append(time.perf_counter())
    return {stage: times[i + 1] - times[i] for i, stage in enumerate(STAGES)}


def steps_of(served: Served, job: Job) -> dict[str, float]:
    """The seconds of each of `STEPS`; their sum is what the caller waited."""
    created, laps = job.created_at.timestamp(), job.metrics
    calls = {name: laps[name] for name in (*STAGES, "file")}
    close = served.completed - laps["claimed"] - sum(calls.values())
    before = {"submit": created - served.started, "in queue": laps["claimed"] - created}
    return before | calls | {"close": close, "result": served.answered - served.completed}


async def fetch_jobs(settings: Settings, ids: list[UUID]) -> list[Job]:
    store = await JobStore.open(database_url(settings))
    try:
        return [job for each in ids if (job := await store.get(each))]
    finally:
        await store.close()


@contextmanager
def service(home: Path) -> Iterator[tuple[str, Settings]]:
    """The service's URL and settings: `serve_config.yaml`, with the traced application and a home of its own."""
    document = yaml.safe_load(Path("serve_config.yaml").read_text())
    application = document["applications"][0]
    application["import_path"] = "tests.load.traced:build"
    application["args"]["home"] = str(home)
    config = home / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    with running(config, port=free_port()) as url:
        yield url, load_settings(config)


def report_overhead(report: Report, served: list[dict[str, float]], local: list[dict[str, float]]) -> None:
    def median(rows: list[dict[str, float]], step: str) -> float:
        return statistics.median(row.get(step, 0.0) for row in rows)

    extra = [sum(s.values()) - sum(p.values()) for s, p in zip(served, local, strict=True)]
    shown = table(f"One job at a time, medians of {len(served)}", "step", "service ms", "in-process ms", "overhead ms")
    for step in STEPS:
        inside = median(local, step)
        outside = median(served, step)
        shown.add_row(step, ms(outside), ms(inside) if step in STAGES else "", ms(outside - inside))
    totals = [statistics.median(sum(row.values()) for row in rows) for rows in (served, local)]
    shown.add_row("whole job", *(ms(total) for total in totals), ms(statistics.median(extra)), style="bold")
    report.add(shown)
    report.add(
        f"Overhead per job {ms(statistics.median(extra))} ms (p10 {ms(percentile(extra, 10))}, p90 {ms(percentile(extra, 90))}); "
        f"target: at most {TARGET_MS} ms."
    )


def report_throughput(report: Report, at_once_s: float, local_s: float) -> None:
    shown = table(f"{AT_ONCE} jobs", "how", "seconds", "jobs/s")
    shown.add_row("submitted at once to the service", f"{at_once_s:.1f}", f"{AT_ONCE / at_once_s:.2f}")
    shown.add_row("one after another in this process", f"{local_s:.1f}", f"{AT_ONCE / local_s:.2f}")
    report.add(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=JOBS, help="one at a time; fewer than usual are not saved")
    count = parser.parse_args().jobs
    report = Report("service", "What the service adds to a job, demo model on CPU", __doc__)
    with (
        TemporaryDirectory(prefix="reelray-") as home,
        report.console.status("starting the service") as shown,
        service(Path(home)) as (url, settings),
        httpx.Client(base_url=url, timeout=120.0) as client,
    ):
        pipeline = Pipeline(ENDPOINT.model, settings.model_configs()[ENDPOINT.model])
        jobs, local = [], []
        for take in range(WARM_UP + count):
            shown.update(f"job {take} of {WARM_UP + count}")
            given = job_input(take)
            jobs.append(serve_job(client, given))
            local.append(render(pipeline, spec_of(given, settings)))
        shown.update(f"{AT_ONCE} jobs at once")
        inputs = [job_input(WARM_UP + count + take) for take in range(AT_ONCE)]
        specs = [spec_of(given, settings) for given in inputs]
        started = time.perf_counter()
        for request_id in [submit(client, given) for given in inputs]:
            follow(client, request_id)
        at_once_s = time.perf_counter() - started
        local_s = sum(sum(render(pipeline, spec).values()) for spec in specs)
        found = run(fetch_jobs(settings, [job.id for job in jobs]))
    served = [steps_of(job, row) for job, row in zip(jobs, found, strict=True)]
    report_overhead(report, served[WARM_UP:], local[WARM_UP:])
    report_throughput(report, at_once_s, local_s)
    if count >= JOBS:
        report.save()


if __name__ == "__main__":
    main()
