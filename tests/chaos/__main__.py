"""Kills, stops and restarts real processes at random while jobs run: is anything lost, or done twice?

    python -m tests.chaos [--jobs 1000] [--seed 1] [--over-s 120] [--save]

Ingress, dispatchers, couriers, store and PostgreSQL are the product's, with its own leases and waits. Small processes stand
in for Ray's stages. Callers repeat submissions blindly under an `Idempotency-Key`. Webhook receivers sometimes answer 500 or
hang up. An attempt counts as dead from the moment when its dispatcher or replica was hit.
"""

import argparse
import asyncio
import sys

from tests.chaos.findings import RESTART_S
from tests.chaos.run import unleash
from tests.chaos.system import Plan
from tests.conftest import embedded
from tests.load.report import Report, percentile


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--over-s", type=float, default=120.0, help="how long submissions take")
    parser.add_argument("--save", action="store_true", help="keep the figures")
    asked = parser.parse_args()
    report = Report("chaos", "What survives: the queue under random blows", __doc__, "`make chaos`")
    report.console.print(f"seed {asked.seed}")
    with embedded() as settings:
        findings, tables = asyncio.run(unleash(settings, Plan(asked.jobs, asked.seed, asked.over_s)))
    for shown in tables:
        report.add(shown)
    restarts = [seconds for each in findings.restarts.values() for seconds in each]
    p99 = percentile(restarts, 99) if restarts else 0.0
    findings.expect(p99 <= RESTART_S, f"dead attempts started again after {p99:.1f} s (p99)")
    report.add(f"Target: p99 at most {RESTART_S:g} s.")
    return report.conclude(findings.faults, save=asked.save)


if __name__ == "__main__":
    sys.exit(main())
