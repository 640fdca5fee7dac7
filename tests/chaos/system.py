"""The processes of a service without Ray: restarted when they die, and hit by random signals ("blows").

Gateways are `reelray gateway` with its worker processes; it also restarts PostgreSQL. Dispatchers and stage replicas are
`tests.chaos.dispatcher` and `tests.chaos.stage`. A process that ends without having been hit is an error.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, SIGTERM
from typing import Any

import psutil
import yaml

from deployments.settings import Settings
from tests.e2e.service import REELRAY, free_port
from tests.patience import PATIENCE_S

ENDPOINT = "fal-ai/animatediff-sparsectrl-lcm"
NO_DATABASE = 75
"""Exit status of a dispatcher that found no database when it started."""
GATEWAYS = 2
DOWN_S = (0.1, 1.0)
"""How long a dead process stays down, as if a supervisor needed that time to notice."""

DECK = (
    *["kill a dispatcher"] * 2,
    *["stop a dispatcher"] * 2,
    "end a dispatcher",
    *["kill a stage replica"] * 4,
    *["stop a stage replica"] * 2,
    *["kill a gateway worker"] * 2,
    "stop a gateway worker",
    "kill a gateway",
    "kill a database backend",
    "restart the database",
)
"""All of them in random order, then all again in another order."""


@dataclass(frozen=True)
class Plan:
    """Settings of a run. over_s: how long submissions take. pause_s: between blows. stop_s: how long a process is stopped.

    workers: of each gateway. webhook_lease_s, webhook_retry_s: for `courier.LEASE_S` and `courier.FIRST_RETRY_S`.
    """

    jobs: int
    seed: int
    over_s: float
    lease_s: float = 10.0
    idle_s: float = 5.0
    pause_s: tuple[float, float] = (0.3, 0.9)
    stop_s: tuple[float, float] = (0.3, 13.0)
    webhook_lease_s: float = 60.0
    webhook_retry_s: float = 7.0
    patience_s: float = 300.0
    workers: int = 2
    dispatchers: int = 3
    replicas: int = 6


@dataclass(frozen=True)
class Blow:
    """at: seconds since 1970."""

    at: float
    name: str
    pid: int
    signal: signal.Signals


@dataclass
class Member:
    """A process that is restarted whenever it ends, in its own process group. down_until: on the monotonic clock."""

    kind: str
    name: str
    command: list[Any]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    down_until: float = 0.0
    starts: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            env = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "ignore"}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        self.starts += 1

    @property
    def pid(self) -> int | None:
        """None while it is down."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def end(self) -> None:
        """Kills its whole process group, including stopped processes; they are gone on return."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, SIGKILL)
            self.process.wait(PATIENCE_S)


@dataclass
class System:
    settings: Settings
    plan: Plan
    random: random.Random
    ports: list[int] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)

    @property
    def traces(self) -> Path:
        return self.settings.home / "trace"

    def enlist(self) -> None:
        """Writes the YAML and lists the system's processes."""
        home, plan = self.settings.home, self.plan
        home.mkdir(parents=True, exist_ok=True)
        queue = {"lease_s": plan.lease_s, "deadlines": {ENDPOINT: {"idle_s": plan.idle_s}}}
        config = home / "serve_config.yaml"
        args = {"home": str(home), "queue": queue, "fetch": {"allow_private": True}}
        config.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
        sockets = home / "sockets"
        for folder in (sockets, self.traces):
            folder.mkdir()
        python = [sys.executable, "-m"]
        for n in range(GATEWAYS):
            port = free_port()
            self.ports.append(port)
            command = [REELRAY, "gateway", "--config", config, "--port", str(port), "--workers", str(plan.workers)]
            self._add("gateway", n, command)
        words = ["--webhook-lease-s", str(plan.webhook_lease_s), "--webhook-retry-s", str(plan.webhook_retry_s)]
        for n in range(plan.dispatchers):
            paths = ["--sockets", sockets, "--trace", self.traces]
            self._add("dispatcher", n, [*python, "tests.chaos.dispatcher", config, *paths, *words])
        for n in range(plan.replicas):
            self._add("stage", n, [*python, "tests.chaos.stage", sockets / f"{n}.sock"])

    def _add(self, kind: str, n: int, command: list[Any]) -> None:
        self.members.append(Member(kind, f"{kind} {n}", command, self.settings.home / f"{kind}-{n}.log"))

    async def supervise(self) -> None:
        """Restarts processes that are down."""
        while True:
            for member in self.members:
                if member.pid is None and time.monotonic() > member.down_until:
                    if member.process is not None and member.down_until == 0.0:
                        self._examine(member)
                        member.down_until = time.monotonic() + self.random.uniform(*DOWN_S)
                    else:
                        member.start()
                        member.down_until = 0.0
            await asyncio.sleep(0.05)

    def _examine(self, member: Member) -> None:
        assert member.process is not None
        with suppress(ProcessLookupError):
            os.killpg(member.process.pid, SIGKILL)  # kills leftover processes of its group, as a service manager does
        hit = any(blow.pid == member.process.pid for blow in self.blows)
        if not hit and not (member.kind == "dispatcher" and member.process.returncode == NO_DATABASE):
            tail = member.log.read_text(errors="replace")[-3000:]
            self.faults.append(f"{member.name} ended by itself with {member.process.returncode}:\n{tail}")

    # Blows.

    async def rage(self) -> None:
        """Deals blows until cancelled."""
        while True:
            for name in self.random.sample(DECK, len(DECK)):
                await asyncio.sleep(self.random.uniform(*self.plan.pause_s))
                with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, ValueError, IndexError):
                    self._strike(name)

    def _strike(self, name: str) -> None:
        verb, _, target = name.partition(" a ")
        kinds: dict[str, Callable[[], list[int]]] = {
            "dispatcher": lambda: self._pids("dispatcher"),
            "stage replica": lambda: self._pids("stage"),
            "gateway worker": self._workers,
            "gateway": lambda: self._pids("gateway"),
            "database backend": self._backends,
        }
        if target:
            pids = kinds[target]()
            if verb == "stop" and len(self.stopped & set(pids)) >= len(pids) - 1:
                return  # one must keep running, or nothing is tested
            self._hit(name, self.random.choice(pids), {"kill": SIGKILL, "stop": SIGSTOP, "end": SIGTERM}[verb])
        else:
            manner, number = self.random.choice([("fast", SIGINT), ("immediate", SIGQUIT), ("SIGKILL", SIGKILL)])
            self._hit(f"{name} ({manner})", self._postmaster(), number)

    def _hit(self, name: str, pid: int, number: signal.Signals) -> None:
        victim = psutil.Process(pid)
        self.blows.append(Blow(time.time(), name, pid, number))
        if name == "kill a gateway":
            os.killpg(pid, number)
            return
        victim.send_signal(number)
        if number == SIGSTOP:
            self.stopped.add(pid)
            task = asyncio.create_task(self._go_on(victim))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _go_on(self, victim: psutil.Process) -> None:
        try:
            shortest, longest = self.plan.stop_s
            await asyncio.sleep(shortest + (longest - shortest) * self.random.random() ** 3)  # mostly short, or no work gets done
        finally:
            self.stopped.discard(victim.pid)
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(SIGCONT)

    def _pids(self, kind: str) -> list[int]:
        return [member.pid for member in self.members if member.kind == kind and member.pid is not None]

    def _workers(self) -> list[int]:
        children = [child for pid in self._pids("gateway") for child in psutil.Process(pid).children()]
        return [child.pid for child in children if any("spawn_main" in word for word in child.cmdline())]

    def _postmaster(self) -> int:
        return int((self.settings.home / "postgres" / "data" / "postmaster.pid").read_text().split()[0])

    def _backends(self) -> list[int]:
        children = psutil.Process(self._postmaster()).children()
        return [child.pid for child in children if child.cmdline()[:1] and "postgres: postgres" in child.cmdline()[0]]

    async def calm(self) -> None:
        """Continues all stopped processes."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@asynccontextmanager
async def running(settings: Settings, plan: Plan) -> AsyncIterator[System]:
    """A system that is starting. All its processes are gone afterwards, except the database, which the caller stops."""
    system = System(settings, plan, random.Random(plan.seed))
    system.enlist()
    supervisor = asyncio.create_task(system.supervise())
    try:
        yield system
        if supervisor.done():
            supervisor.result()
    finally:
        supervisor.cancel()
        await asyncio.wait([supervisor])
        await system.calm()
        for member in system.members:
            member.end()
