"""Checks the database, the files and the receivers after a run: every promise, and how soon dead attempts were followed up."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import asyncpg

from deployments.jobs.job import TRANSITIONS, JobState
from tests.chaos.callers import Outcome
from tests.chaos.stage import clip_of
from tests.chaos.system import Blow, System
from tests.deployments.webhooks.receiver import Received, is_signed

RESTART_S = 20.0
"""99 of 100 dead attempts must be followed by another within this time."""
EXHAUSTED = {"runner_connection_timeout": 3, "runner_disconnected": 3}
"""Error type with which a job may fail here -> the first attempt at which it may: see `jobs/retry.py`."""
JITTER_S = 0.3
"""Greatest difference between an event's time in the database and in a trace."""


@dataclass
class Findings:
    """faults: broken promises, in words; there should be none. restarts: what the attempt died of -> seconds to the next one."""

    faults: list[str] = field(default_factory=list)
    restarts: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    figures: dict[str, int | float] = field(default_factory=dict)

    def expect(self, kept: bool, promise: str, *broken: object) -> None:
        """Notes a promise that was not kept."""
        if not kept:
            self.faults.append(" ".join([promise, *(str(each)[:500] for each in broken)]))


@dataclass(frozen=True)
class Event:
    at: float
    state: str
    attempt: int
    reason: str | None


async def webhooks_pending(url: str) -> int:
    """How many webhooks are still to be delivered."""
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM webhook_outbox WHERE next_attempt_at IS NOT NULL"))
    finally:
        await connection.close()


async def examine(url: str, system: System, outcome: Outcome, received: Sequence[Received], jwks: dict[str, Any]) -> Findings:
    """Runs all checks. url: of the database, which must be running."""
    connection = await asyncpg.connect(url)
    try:
        jobs = await connection.fetch("SELECT *, input ->> 'prompt' AS prompt FROM jobs")
        rows = await connection.fetch("SELECT job_id, at, state, attempt, reason FROM job_events ORDER BY id")
        outbox = await connection.fetch("SELECT job_id, body, delivered_at FROM webhook_outbox")
        noted_files = {row["name"] for row in await connection.fetch("SELECT name FROM stored_files")}
    finally:
        await connection.close()
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for row in rows:
        events[str(row["job_id"])].append(Event(_seconds(row["at"]), row["state"], row["attempt"], row["reason"]))
    findings = Findings([*system.faults, *outcome.faults])
    _check_jobs(findings, system, outcome, jobs)
    _check_paths(findings, jobs, events)
    _check_files(findings, system, jobs, noted_files)
    _check_webhooks(findings, jobs, outbox, received, jwks)
    _time_restarts(findings, system, events)
    return findings


def _check_jobs(findings: Findings, system: System, outcome: Outcome, jobs: Sequence[Mapping[str, Any]]) -> None:
    wanted = [f"job {number}" for number in range(system.plan.jobs)]
    by_prompt = defaultdict(list)
    for job in jobs:
        by_prompt[job["prompt"]].append(str(job["id"]))
    twice = [prompt for prompt, ids in by_prompt.items() if len(ids) > 1]
    lost = [prompt for prompt, ids in outcome.acknowledged.items() if set(ids) != set(by_prompt[prompt])]
    stuck = [f"{job['prompt']}: {job['state']}" for job in jobs if not JobState(job["state"]).ended]
    findings.expect(not twice, "submissions with two jobs:", twice)
    findings.expect(not lost, "submissions acknowledged with other ids than their job's:", lost)
    findings.expect(not stuck, "jobs that have not ended:", stuck)
    findings.expect(set(outcome.ended) == set(wanted), "callers without a result:", set(wanted) - set(outcome.ended))
    exhausted = 0
    for job in jobs:
        if job["state"] == "failed":
            kind = json.loads(job["failure"])["error_type"]
            exhausted += kind in EXHAUSTED and job["attempt"] >= EXHAUSTED[kind]
    ends = Counter(job["state"] for job in jobs)
    findings.expect(ends["succeeded"] + exhausted == len(jobs), "jobs that failed without need:", ends)
    findings.expect(exhausted <= max(1, len(jobs) // 100), "jobs that failed after their last attempt:", exhausted)
    findings.figures |= {
        "jobs": len(jobs),
        "lost": len(lost),
        "stuck": len(stuck),
        "submissions with two jobs": len(twice),
        "succeeded": ends["succeeded"],
        "failed, their attempts used up": exhausted,
        "most attempts of a job": max((job["attempt"] for job in jobs), default=0),
    }


def _check_paths(findings: Findings, jobs: Sequence[Mapping[str, Any]], events: Mapping[str, list[Event]]) -> None:
    doubled = 0
    for job in jobs:
        path = [JobState(event.state) for event in events[str(job["id"])]]
        legal = all(after in TRANSITIONS[before] for before, after in pairwise(path))
        findings.expect(path[:1] == [JobState.QUEUED] and legal, f"{job['prompt']} went", path)
        findings.expect(path[-1:] == [JobState(job["state"])], f"{job['prompt']} is {job['state']}, last event", path[-1:])
        ends = sum(state.ended for state in path)
        doubled += ends > 1
        findings.expect(ends == 1, f"{job['prompt']} ended {ends} times:", path)
    findings.figures["with two results"] = doubled


def _check_files(findings: Findings, system: System, jobs: Sequence[Mapping[str, Any]], noted: set[str]) -> None:
    folder = Path(system.settings.files_url)
    named: dict[str, str] = {}
    for job in jobs:
        if job["state"] == "succeeded":
            video = json.loads(job["result"])["video"]
            name = video["url"].removeprefix("/files/")
            findings.expect(name not in named, f"{job['prompt']} has the file of", named.get(name))
            named[name] = job["prompt"]
            number = int(job["prompt"].split()[1])
            kept = (folder / name).read_text() if (folder / name).exists() else None
            findings.expect(kept == clip_of(job["prompt"], number), f"the file of {job['prompt']} holds", kept)
    kept_files = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
    whole = {name for name in kept_files if not name.endswith(".part")}
    findings.expect(whole <= noted, "files that will never expire:", whole - noted)
    findings.figures["files of attempts that came to nothing"] = len(whole) - len(named)
    findings.figures["unfinished files"] = len(kept_files) - len(whole)


def _check_webhooks(
    findings: Findings,
    jobs: Sequence[Mapping[str, Any]],
    outbox: Sequence[Mapping[str, Any]],
    received: Sequence[Received],
    jwks: dict[str, Any],
) -> None:
    bodies = defaultdict(list)
    for request in received:
        bodies[request.request_id].append(request.body)
        if not is_signed(request, jwks, float(request.headers["x-fal-webhook-timestamp"])):
            findings.faults.append(f"a webhook of {request.request_id} has no good signature")
    kept = {str(row["job_id"]): row for row in outbox}
    missing, differing = [], []
    for job in jobs:
        job_id = str(job["id"])
        digests = {hashlib.sha256(body).hexdigest() for body in bodies[job_id]}
        if not digests or job_id not in kept or kept[job_id]["delivered_at"] is None:
            missing.append(job["prompt"])
        elif digests != {hashlib.sha256(kept[job_id]["body"]).hexdigest()}:
            differing.append(job["prompt"])
        for body in bodies[job_id][:1]:
            told = json.loads(body)
            as_ended = "OK" if job["state"] == "succeeded" else "ERROR"
            findings.expect(told["status"] == as_ended, f"{job['prompt']} was told as", told)
    findings.expect(not missing, "webhooks not delivered:", missing)
    findings.expect(not differing, "webhooks with two payloads:", differing)
    figures = {"not delivered": len(missing), "with two payloads": len(differing), "requests": len(received)}
    findings.figures |= {f"webhooks {name}": count for name, count in figures.items()}


def _time_restarts(findings: Findings, system: System, events: Mapping[str, list[Event]]) -> None:
    """Measures the time from an attempt's death to the next `running`, by cause of death."""
    depends: defaultdict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    for trace in system.traces.glob("*.jsonl"):
        for line in trace.read_text().splitlines():
            noted = json.loads(line)
            depends[noted["job"], noted["attempt"]].append((noted["at"], noted["pid"]))
    blows: defaultdict[int, list[Blow]] = defaultdict(list)
    for blow in system.blows:
        blows[blow.pid].append(blow)
    for job_id, path in events.items():
        for began, ended, again in zip(path, path[1:], path[2:], strict=False):
            if (began.state, ended.state, again.state) == ("running", "queued", "running"):
                pids = {pid for at, pid in depends[job_id, began.attempt] if began.at - JITTER_S <= at <= ended.at + JITTER_S}
                hits = [blow for pid in pids for blow in blows[pid] if began.at - JITTER_S <= blow.at <= ended.at]
                cause, died = _death(hits, began, ended)
                findings.restarts[cause].append(again.at - died)


def _death(hits: Sequence[Blow], began: Event, ended: Event) -> tuple[str, float]:
    """Why and when an attempt died, at the earliest time that it may have: a stop counts from its beginning, not from the lease's
    end. Without a known cause it counts from the claim, for example if a dying database never answered the claim."""
    for number in (SIGKILL, SIGSTOP, SIGTERM):
        fitting = [blow for blow in hits if blow.signal == number]
        if fitting:
            last = max(fitting, key=lambda blow: blow.at)
            return last.name, last.at
    if ended.reason is not None and "lease" not in ended.reason:
        return ended.reason.rstrip("."), ended.at
    return "lost with a connection", began.at


def _seconds(at: datetime) -> float:
    return at.timestamp()
