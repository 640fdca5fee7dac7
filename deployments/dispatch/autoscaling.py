"""How many replicas each stage should have: Ray Serve's application-level policy, on seconds of backlog.

Serve calls the policy ten times a second in the loop that also deploys and heals every application of the cluster. So it only
divides numbers that a thread has read, and it never raises: where anything is wrong, the targets stay as they are.

For each stage, with

    w  seconds of work that waits
    l  seconds that are left of the jobs at work, of which there are b
    a  seconds of work that arrive every second
    m  the same, averaged over minutes
    r  replicas, and others that are starting
    R  seconds that a new replica takes to be ready, as measured
    e  seconds that those which are starting will work before a new one is ready: for each, how long ago it was asked for
    T  `drain_s`

the work that still waits once new replicas would be ready is  p = min(w + a R, w + l + a R - r R),  or  p - e  with those that
are starting. Of replicas

    max(min(b, r), m)  are needed in any case, and with p <= 0 no more, as they would come too late to find work;
    (p - e) / T        more are needed to work that off in T;
    p / T              more, as far as they are starting, stay needed until they are there.

No more are needed than there are calls to be at work, nor, beside those for what waits in this stage itself, than are fed by a
slower stage before it with the replicas that it is to have, and by the endpoint's slowest at its largest; and one at least while
there is any work. The target is the largest need of the last `idle_s` seconds. So it rises with the first reading
that needs more, and falls only when fewer were enough for that long: no rise is taken back sooner.
"""

import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from deployments.dispatch.backlog import READY_S, STAGES, BacklogReader, Decision, Scaled, StageLoad, name_of

logger = logging.getLogger("ray.serve")  # the only one that is shown in Serve's controller

STALE_S = 30.0
"""A reading older than this is not used."""
LOG_S = 60.0
"""Errors are logged no more often than this."""
LONGEST_READY_S = 3600.0
"""A replica that takes longer to be ready tells nothing about the next: there was no node for it."""
SUSTAINED_S = 100.0
"""The time constant of the average of what arrives."""
HEADROOM = 1.25
"""By how much a stage may exceed what another feeds."""


@dataclass
class Stage:
    """What the policy remembers of one deployment. needs: (when, replicas), falling, of the last `idle_s` seconds.

    asked: (when, target) of rises whose replicas are not all ready. ready_s: None until it was measured or found.
    told: the target that was logged last. sustained: see `sustain`; at: when that was.
    """

    needs: deque[tuple[float, int]] = field(default_factory=deque)
    asked: deque[tuple[float, int]] = field(default_factory=deque)
    ready_s: float | None = None
    target: int | None = None
    told: int | None = None
    sustained: float = 0.0
    at: float | None = None

    def sustain(self, now: float, arriving: float) -> float:
        """The average of `arriving` over the last minutes."""
        weight = 1.0 if self.at is None else 1 - math.exp(-max(0.0, now - self.at) / SUSTAINED_S)
        self.sustained, self.at = self.sustained + weight * (arriving - self.sustained), now
        return self.sustained

    def observe(self, now: float, replicas: int, target: int) -> None:
        """Measures how long replicas take to be ready: from the rise of the target to so many replicas."""
        if self.target is not None and target > self.target:
            self.asked.append((now, target))
        while self.asked and self.asked[-1][1] > target:  # no longer wanted
            self.asked.pop()
        while self.asked and self.asked[0][1] <= replicas:
            took_s = now - self.asked.popleft()[0]
            if took_s <= LONGEST_READY_S:
                self.ready_s = took_s if self.ready_s is None else 0.7 * self.ready_s + 0.3 * took_s
        self.target = target

    def ahead_s(self, now: float, replicas: int, target: int, ready_s: float) -> float:
        """Seconds that the replicas which are starting will work before one that is asked for now is ready."""
        ahead_s, known = 0.0, replicas
        for at, asked in self.asked:
            ahead_s += max(0, asked - known) * min(now - at, ready_s)
            known = max(known, asked)
        return ahead_s + max(0, target - known) * ready_s / 2  # of those an earlier process has asked for

    def largest(self, now: float, need: int, idle_s: float) -> int:
        """The largest need of the last `idle_s` seconds, this one included."""
        while self.needs and self.needs[-1][1] <= need:
            self.needs.pop()
        self.needs.append((now, need))
        while self.needs[0][0] < now - idle_s:
            self.needs.popleft()
        return self.needs[0][1]


class BacklogPolicy:
    """reader: of the backlog. A call takes deployment -> Serve's context, and returns deployment -> target, and no state.

    A deployment that is left out keeps its target.
    """

    def __init__(self, reader: BacklogReader, clock: Callable[[], float] = time.monotonic):
        self._reader = reader
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._logged_at = -math.inf
        self._started = False

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], None]:
        """See the class. Starts the reader at the first call. Never raises."""
        try:
            if not self._started:
                self._started = True
                self._reader.start()
                weakref.finalize(self, self._reader.stop)  # Serve makes a new policy with every deploy
            return self._targets(contexts), None
        except Exception:
            self._log("replicas stay as they are: the autoscaling failed")
            return {}, None

    def _targets(self, contexts: Mapping[Any, Any]) -> dict[Any, int]:
        reading, now = self._reader.reading, self._clock()  # in this order: the thread may make another one in between
        by_name = {context.deployment_name: (key, context) for key, context in contexts.items()}
        for name, (_, context) in by_name.items():
            self._stages.setdefault(name, Stage()).observe(now, context.current_num_replicas, context.target_num_replicas)
        if reading is None or not 0 <= now - reading.at <= STALE_S:
            for name, (_, context) in by_name.items():  # for all that is known, this many are needed
                self._stages[name].needs.clear()
                self._stages[name].needs.append((now, context.target_num_replicas))
            return {}
        targets: dict[Any, int] = {}
        decisions: dict[str, Decision] = {}
        for endpoint, loads in reading.endpoints.items():
            try:
                made = self._decisions(now, endpoint, loads, reading.ready_s, {name: each for name, (_, each) in by_name.items()})
            except Exception:
                self._log(f"the replicas of {endpoint.family} stay as they are: their load makes no sense")
                continue
            decisions |= made
            targets |= {by_name[name][0]: decision.target for name, decision in made.items()}
        self._reader.decisions = decisions
        for key, target in targets.items():
            _overrule(contexts[key], target)
        return targets

    def _decisions(
        self, now: float, endpoint: Scaled, loads: Sequence[StageLoad], known_s: Mapping[str, float], contexts: Mapping[str, Any]
    ) -> dict[str, Decision]:
        """Deployment -> decision, for the stages of an endpoint that are autoscaled."""
        scaled = [(name, load, contexts[name]) for name, load in _named(endpoint, loads) if name in contexts]
        slowest = min(
            (each.capacity_adjusted_max_replicas / load.job_s for _, load, each in scaled if load.job_s > 0), default=math.inf
        )
        before: list[tuple[float, float]] = []  # of the earlier stages: seconds of a job, and jobs a second that they can do
        made = {}
        for name, load, context in scaled:
            stage = self._stages[name]
            if not stage.needs:
                stage.needs.append((now, context.target_num_replicas))  # what this process cannot know: what was needed before
            if stage.ready_s is None and 0 <= known_s.get(name, -1.0) <= LONGEST_READY_S:
                stage.ready_s = known_s[name]
            ready_s = READY_S if stage.ready_s is None else stage.ready_s
            replicas, target = context.current_num_replicas, context.target_num_replicas
            lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
            fed = min([slowest, *(rate for job_s, rate in before if job_s > load.job_s)])
            sustained = stage.sustain(now, load.arriving)
            ahead_s = stage.ahead_s(now, replicas, target, ready_s)
            need = needed(load, replicas, target, ready_s, endpoint.drain_s, sustained, ahead_s)
            need = min(need, useful(load, fed, endpoint.drain_s, highest))
            wanted = max(lowest, min(stage.largest(now, need, endpoint.idle_s), highest))
            if load.job_s > 0:
                before.append((load.job_s, max(wanted, target) / load.job_s))
            made[name] = Decision(replicas, wanted, load.waiting_s / max(1, replicas), ready_s)
            if wanted not in (target, stage.told):
                fields = {"action": "scale", "deployment": name, "from": target, "to": wanted, "waiting_s": load.waiting_s}
                logger.info(f"{name}: {target} -> {wanted} replicas for {load.waiting_s:.0f} s of work", extra=fields)
            stage.told = wanted
        return made

    def _log(self, message: str) -> None:
        if self._clock() - self._logged_at >= LOG_S:
            self._logged_at = self._clock()
            logger.exception(message, extra={"action": "autoscaling_failed"})


def needed(
    load: StageLoad,
    replicas: int,
    target: int,
    ready_s: float,
    drain_s: float,
    sustained: float = 0.0,
    ahead_s: float = 0.0,
) -> int:
    """How many replicas a stage needs now; see the module. ahead_s: `e` there.

    Raises `ValueError` for a load that is negative or not finite.
    """
    values = astuple(load)
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"{load} cannot be")
    if not (load.waiting_s or load.busy):
        return 0
    at_work = max(min(load.busy, replicas), sustained)
    coming_s = load.waiting_s + load.arriving * ready_s
    left_s = min(coming_s, coming_s + load.running_s - replicas * ready_s)
    need = at_work + max(0.0, left_s - ahead_s) / drain_s
    need = max(need, min(target, at_work + max(0.0, left_s) / drain_s))
    return max(1, math.ceil(min(need, load.parallel) - 1e-9))


def useful(load: StageLoad, fed: float, drain_s: float, highest: int) -> int:
    """How many replicas of a stage can have work. fed: jobs a second that others feed."""
    if load.job_s <= 0:
        return highest
    return max(1, math.ceil(min(HEADROOM * fed * load.job_s + load.here_s / drain_s, highest)))


def _overrule(context: Any, target: int) -> None:
    """Has Serve follow the policy where it would not.

    Without replicas Serve wants one, whatever the policy says, as long as the mean of the calls in the last 30 s is above 0: it
    would start one again right after the last has ended (seen), and a queue that grows while the first one starts would wait for
    that one. The reading is fresher than that mean. `upscale_delay_s` has no effect where the target is what is wanted already.
    """
    if context.current_num_replicas == 0:
        context.total_num_requests = 0.0
    context.target_num_replicas = max(context.target_num_replicas, target)


def _named(endpoint: Scaled, loads: Sequence[StageLoad]) -> list[tuple[str, StageLoad]]:
    return [(name_of(endpoint, stage), load) for stage, load in zip(STAGES, loads, strict=True)]
