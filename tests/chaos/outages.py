"""Takes the database away in every way but a crash while jobs run: is anything lost, counted as an attempt, or ended by it?

    python -m tests.chaos.outages [--jobs 100] [--save]

Two gateways, a dispatcher and its courier are the product's. The database is read-only as after a failover, has a full disk, ends
every connection again and again, and cancels what takes longer than 5 ms. The full disk is the server's error from a trigger.
"""

import argparse
import asyncio
import sys
from collections import Counter
from dataclasses import dataclass

import asyncpg

from deployments.hosting.embedded_postgres import database_url
from deployments.settings import Settings
from tests.chaos.findings import Findings
from tests.chaos.run import promises, unleash
from tests.chaos.system import Plan, System
from tests.conftest import embedded
from tests.load.report import Report

TABLES = "jobs", "job_events", "job_logs", "stored_files", "idempotency_keys", "webhook_outbox", "webhook_deliveries"
FULL_DISK = """
CREATE OR REPLACE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN IF {full} THEN RAISE disk_full; END IF; RETURN NULL; END $$
"""
CONNECTIONS = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
UNEXPLAINED = """
SELECT jobs.id, attempt FROM jobs
WHERE attempt > 1 + (SELECT count(*) FROM job_events WHERE job_id = jobs.id AND reason = 'lease expired')
"""
LEASES = "SELECT count(*) FROM job_events WHERE reason = 'lease expired'"
GAP_S = 1.0


@dataclass(frozen=True)
class Outages:
    """How long each lasts, in seconds; terminations: how often every connection is ended."""

    read_only_s: float = 3.0
    full_disk_s: float = 30.0
    terminations: int = 10
    timeout_s: float = 3.0

    @property
    def all_s(self) -> float:
        return self.read_only_s + self.full_disk_s + 0.3 * self.terminations + self.timeout_s + 5 * GAP_S


async def happen(outages: Outages, url: str) -> None:
    """All of them, one after the other."""
    sql = await asyncpg.connect(url, server_settings={"default_transaction_read_only": "off", "statement_timeout": "0"})

    async def configured(setting: str, value: str, for_s: float) -> None:
        await sql.execute(f"ALTER SYSTEM SET {setting} = {value}")
        await sql.execute("SELECT pg_reload_conf()")
        await asyncio.sleep(for_s)
        await sql.execute(f"ALTER SYSTEM RESET {setting}")
        await sql.execute("SELECT pg_reload_conf()")
        await asyncio.sleep(GAP_S)

    try:
        await sql.execute(FULL_DISK.format(full="false"))
        for name in TABLES:
            trigger = f"CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON {name} FOR EACH STATEMENT"
            await sql.execute(f"{trigger} EXECUTE FUNCTION full_disk()")
        await asyncio.sleep(GAP_S)
        await configured("default_transaction_read_only", "on", outages.read_only_s)
        await sql.execute(FULL_DISK.format(full="true"))
        await asyncio.sleep(outages.full_disk_s)
        await sql.execute(FULL_DISK.format(full="false"))
        await asyncio.sleep(GAP_S)
        for _ in range(outages.terminations):
            await sql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {CONNECTIONS}")
            await asyncio.sleep(0.3)
        await configured("statement_timeout", "'5ms'", outages.timeout_s)
    finally:
        await sql.close()


async def survive(settings: Settings, outages: Outages, plan: Plan) -> Findings:
    """The findings of one run; see `unleash`. Every process must be the one that was started."""

    async def rage(system: System) -> None:
        await happen(outages, await asyncio.to_thread(database_url, settings))
        starts = Counter(member.starts for member in system.members)
        if set(starts) != {1}:
            system.faults.append(f"processes by how often they were started: {starts}")

    findings, _ = await unleash(settings, plan, rage, to_its_end=True)
    sql = await asyncpg.connect(await asyncio.to_thread(database_url, settings))
    try:
        unexplained = await sql.fetch(UNEXPLAINED)
        findings.figures["leases that ran out"] = await sql.fetchval(LEASES)
    finally:
        await sql.close()
    findings.figures["attempts counted without that"] = len(unexplained)
    findings.expect(not unexplained, "jobs with attempts that no lease explains:", unexplained)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("outages", "What survives: jobs beside a database that is away", __doc__, "`make chaos`")
    outages = Outages()
    plan = Plan(asked.jobs, seed=1, over_s=outages.all_s, workers=1, dispatchers=1, replicas=3, webhook_retry_s=1.0)
    with embedded() as settings:
        findings = asyncio.run(survive(settings, outages, plan))
    report.add(promises(findings, plan))
    report.add(f"{outages}.")
    return report.conclude(findings.faults, save=asked.save)


if __name__ == "__main__":
    sys.exit(main())
