"""A run: callers, receivers and blows at once; then no more blows until the last webhook is delivered; then the checks."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
from rich.table import Table

from deployments.hosting.embedded_postgres import database_url
from deployments.settings import Settings
from tests.chaos import callers
from tests.chaos.findings import Findings, examine, webhooks_pending
from tests.chaos.system import Plan, System, running
from tests.load.report import percentile, table
from tests.load.standstill import watched
from tests.patience import PATIENCE_S

STANDSTILL = "seconds that this process stood still at most"


async def unleash(
    settings: Settings,
    plan: Plan,
    rage_at: Callable[[System], Coroutine[Any, Any, None]] = System.rage,
    *,
    to_its_end: bool = False,
) -> tuple[Findings, list[Table]]:
    """Findings and tables of one run. settings: their home must not exist yet; the caller stops the database server in it.

    rage_at: what happens to the system while callers wait for their jobs; to_its_end: and if they need not wait, until it ends.
    """
    async with callers.receivers(plan) as receivers, running(settings, plan) as system, watched() as longest:
        async with httpx.AsyncClient(trust_env=False) as http:
            await asyncio.gather(*(_ready(http, port) for port in system.ports))
            began = time.monotonic()
            rage = asyncio.create_task(rage_at(system))
            try:
                outcome = await callers.Callers(system, receivers).run()
                if to_its_end:
                    await rage
            finally:
                raged = rage.done()
                rage.cancel()
                await asyncio.wait([rage])
            if raged:
                rage.result()
            chaos_s = time.monotonic() - began
            await system.calm()
            url = await asyncio.to_thread(database_url, settings)
            for _ in range(int(plan.patience_s)):
                if not await webhooks_pending(url):
                    break
                await asyncio.sleep(1)
            await asyncio.gather(*(_ready(http, port) for port in system.ports))
            jwks = (await http.get(f"http://127.0.0.1:{system.ports[0]}/.well-known/jwks.json")).json()
        received = [request for receiver in receivers for request in receiver.received]
        findings = await examine(url, system, outcome, received, jwks)
        findings.figures |= {"repeated requests of callers": outcome.retries.total()}
        findings.figures |= {STANDSTILL: round(longest[0], 1)}
        findings.figures |= {"seconds of blows": round(chaos_s), "seconds in all": round(time.monotonic() - began)}
        return findings, [promises(findings, plan), _blows(system), _restarts(findings)]


async def _ready(http: httpx.AsyncClient, port: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if (await http.get(f"http://127.0.0.1:{port}/health", timeout=2)).is_success:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.1)


def promises(findings: Findings, plan: Plan) -> Table:
    shown = table(f"{plan.jobs} jobs, seed {plan.seed}, leases of {plan.lease_s:g} s", "what", "count")
    for name, count in findings.figures.items():
        shown.add_row(name, f"{count:,}")
    return shown


def _blows(system: System) -> Table:
    shown = table("Blows", "what", "count")
    for name, count in sorted(Counter(blow.name for blow in system.blows).items()):
        shown.add_row(name, str(count))
    return shown


def _restarts(findings: Findings) -> Table:
    """In seconds."""
    shown = table("From an attempt's death to the next one, in seconds", "what it died of", "attempts", "p50", "p99", "max")
    everything = [seconds for each in findings.restarts.values() for seconds in each]
    for cause, seconds in [*sorted(findings.restarts.items()), ("all", everything)]:
        if seconds:
            worst = (percentile(seconds, 50), percentile(seconds, 99), max(seconds))
            shown.add_row(cause, str(len(seconds)), *(f"{each:.1f}" for each in worst))
    return shown
