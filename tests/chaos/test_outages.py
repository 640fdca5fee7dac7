from tests.chaos.outages import Outages, survive
from tests.chaos.system import Plan
from tests.conftest import embedded


async def test_jobs_live_through_a_database_that_is_away():
    """A small run of `python -m tests.chaos.outages`."""
    outages = Outages(read_only_s=1.0, full_disk_s=1.5, terminations=3, timeout_s=1.0)
    plan = Plan(jobs=25, seed=1, over_s=outages.all_s - 2, workers=1, dispatchers=1, replicas=2, webhook_retry_s=0.3)
    with embedded() as settings:
        findings = await survive(settings, outages, plan)
    assert not findings.faults, "\n\n".join(findings.faults)
