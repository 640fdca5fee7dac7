from rich.console import Console

from tests.chaos.findings import RESTART_S
from tests.chaos.run import STANDSTILL, unleash
from tests.chaos.system import Plan
from tests.conftest import embedded
from tests.load.report import percentile
from tests.patience import PATIENCE_S


async def test_nothing_is_lost_stuck_or_done_twice_whatever_is_killed():
    """A small run of `make chaos`, with shorter leases and webhook retries, so that recovery happens within the test."""
    plan = Plan(
        jobs=60,
        seed=1,
        over_s=10.0,
        lease_s=2.0,
        idle_s=3.0,
        stop_s=(0.3, 3.5),
        webhook_lease_s=3.0,
        webhook_retry_s=0.5,
        patience_s=PATIENCE_S,
    )
    with embedded() as settings:
        findings, tables = await unleash(settings, plan)
    console = Console(width=120)
    for shown in tables:
        console.print(shown)
    assert not findings.faults, "\n\n".join([f"seed {plan.seed}", *findings.faults])
    restarts = [seconds for each in findings.restarts.values() for seconds in each]
    assert restarts
    assert percentile(restarts, 99) <= RESTART_S + findings.figures[STANDSTILL]
