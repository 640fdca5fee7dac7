"""Where one sampler becomes the limit: the time that the product's scheduling takes for a unit, by the number of replicas."""

import time
from collections import deque

from deployments.stages.scheduling import Run, Scheduler
from engines.units import Unit

UNIT_S = 0.2
"""About a unit of ControlNeXt on an H200."""
WIDTH = 26
"""Its units of a step, at full length."""


def unit_cpu_s(replicas: int, units: int = 300) -> float:
    """CPU seconds of one unit's scheduling, from its submission to its end, with work for twice as many replicas."""
    now = 0.0
    scheduler = Scheduler(lambda: now)
    for name in range(replicas):
        scheduler.join(str(name))
    jobs = [scheduler.add_job() for _ in range(max(2, 2 * replicas // WIDTH))]
    left = dict.fromkeys(jobs, WIDTH)
    for job in jobs:
        scheduler.submit(job, [Unit(size=1.0, keeps=n) for n in range(WIDTH)])
    at_work: deque[Run] = deque(scheduler.orders().start)
    began = 0.0
    for count in range(replicas + units):
        if count == replicas:  # each has had one by now
            began = time.thread_time()
        now += UNIT_S / replicas
        run = at_work.popleft()
        job = run.ticket.job
        left[job] -= scheduler.ended(run, "answered")
        if not left[job]:
            left[job] = WIDTH
            scheduler.submit(job, [Unit(size=1.0, keeps=n) for n in range(WIDTH)])
        at_work.extend(scheduler.orders().start)
        scheduler.due_in_s()
    return (time.thread_time() - began) / units
