"""How much work the jobs are, for the autoscaling: what waits, runs and arrives, and how long such work has taken."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from deployments.jobs.database import QUERIES, Database

SAMPLE = 5000
"""Jobs in line whose work is added up; what waits behind them counts with their means."""

Units = tuple[float, float, float]
"""Of preprocessing, denoising and decoding; see `engines.demand`."""


@dataclass(frozen=True)
class Waiting:
    """What waits at an endpoint and may start. units, parallel: the sums of its jobs'."""

    jobs: float
    units: Units
    parallel: float


@dataclass(frozen=True)
class Running:
    """A job that runs. stage, fraction: how far it was when it told last; None if it has not told."""

    endpoint: str
    units: Units
    parallel: int
    stage: str | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Arrived:
    """The jobs that were submitted at an endpoint in the last `within_s` seconds. units: the sums of theirs."""

    within_s: float
    jobs: int
    units: Units


@dataclass(frozen=True)
class Measured:
    """A job that ended. seconds: stage -> of replicas' work there, all of them together."""

    endpoint: str
    units: Units
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class StageStatus:
    """A stage as its autoscaling sees it. unit_s: seconds a unit takes. ready_s: seconds until a new replica is ready.

    backlog_s: seconds of work that waits, over the replicas. target: of replicas.
    """

    endpoint: str
    stage: str
    unit_s: float
    ready_s: float
    backlog_s: float
    replicas: int
    target: int


class Work:
    """The work in a database, at the endpoints given. Every call may raise `StoreAway`."""

    def __init__(self, database: Database, endpoints: Sequence[str]) -> None:
        self._database = database
        self._endpoints = list(endpoints)
        self._measured_until: datetime | None = None

    async def waiting(self) -> dict[str, Waiting]:
        """Endpoint -> what waits there; endpoints where nothing waits, and paused ones, are left out."""
        rows = await self._fetch("waiting_work", self._endpoints, SAMPLE)
        return {row["endpoint"]: _waiting(row) for row in rows}

    async def running(self) -> list[Running]:
        """Every job that runs."""
        rows = await self._fetch("running_work", self._endpoints)
        return [_running(row["endpoint"], tuple(row["units"]), row["parallel"], row["progress"]) for row in rows]

    async def arrived(self, within_s: Sequence[float]) -> dict[str, list[Arrived]]:
        """Endpoint -> the jobs that were submitted in the last seconds, for each of several times."""
        now = time.time()
        first = [UUID(int=int((now - each) * 1000) << 80) for each in within_s]  # ids are UUIDv7
        found: dict[str, list[Arrived]] = {}
        for row in await self._fetch("arrived_work", self._endpoints, first):
            units = (row["preprocess"], row["denoise"], row["decode"])
            found.setdefault(row["endpoint"], []).append(Arrived(within_s[row["place"] - 1], row["jobs"], units))
        return found

    async def measured(self) -> list[Measured]:
        """The jobs that have ended since the last call, or in the last hour; at most 1,000, the rest with the next call."""
        rows = await self._fetch("measured_work", self._endpoints, self._measured_until)
        if rows:
            self._measured_until = rows[-1]["finished_at"]
        return [_measured(row) for row in rows if isinstance(row["seconds"], dict)]

    async def save(self, stages: Sequence[StageStatus]) -> None:
        """Writes what is known of the stages."""
        await self._fetch("save_stages", *map(list, zip(*map(astuple, stages), strict=True)))

    async def _fetch(self, query: str, *args: object) -> list[Any]:
        return await self._database.fetch(QUERIES[query], *args)


async def stages(database: Database) -> list[tuple[StageStatus, float]]:
    """What is known of the stages of all endpoints, each with its age in seconds."""
    rows = [dict(row) for row in await database.fetch(QUERIES["stages"])]
    return [(StageStatus(**row), age_s) for row in rows for age_s in [row.pop("age_s")]]


def _waiting(row: Mapping[str, Any]) -> Waiting:
    jobs = float(row["jobs"])
    preprocess, denoise, decode, parallel = (jobs * row[name] for name in ("preprocess", "denoise", "decode", "parallel"))
    return Waiting(jobs, (preprocess, denoise, decode), parallel)


def _running(endpoint: str, units: Any, parallel: int, progress: dict[str, Any] | None) -> Running:
    told = progress or {}
    return Running(endpoint, units, parallel, told.get("stage"), told.get("fraction"))


def _measured(row: Mapping[str, Any]) -> Measured:
    seconds, denoise_s = row["seconds"], row["denoise_s"]
    return Measured(row["endpoint"], tuple(row["units"]), seconds if denoise_s is None else seconds | {"denoise": denoise_s})
