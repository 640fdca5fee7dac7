"""Every rule of `cases/`, with the unmodified clients from PyPI and npm: see `conformance.py`.

J1, J2, J3 and P1, P2, P4 are the recipes of fal-queue-protocol.md, section 1.4. Rules about keys need a service with keys, which
the one in this process is.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest

from deployments.hosting.tls import TlsFiles
from tests.conftest import TEMPLATE, execute, of_database
from tests.wire.conformance import JS, PYTHON, Case, Outcomes, chosen, declared, outcomes
from tests.wire.conftest import HOSTINGS
from tests.wire.hosting import Hosted
from tests.wire.page import install_client

CASES = declared()
pytestmark = [
    pytest.mark.timeout(600),  # the first rule of a service waits for all of them
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # the clients end with open connections
]


@pytest.fixture(scope="package")
def found(host: Hosted | None, hosting: str, postgres: str, tls: TlsFiles) -> Iterator[Outcomes]:
    install_client()
    with TemporaryDirectory(prefix="reelray-") as home:
        if host is not None:
            yield asyncio.run(outcomes(host, hosting, host.settings.database, Path(home), tls))
            asyncio.run(execute(host.settings.database, "TRUNCATE jobs CASCADE"))
            return
        name = f"conformance_{uuid4().hex}"
        asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
        yield asyncio.run(outcomes(None, hosting, of_database(postgres, name), Path(home), tls))
        asyncio.run(execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(found: Outcomes, hosting: str, case: Case) -> None:
    told = {recipe: found[recipe][case.rule] for recipe in case.recipes if case.rule in found[recipe]}
    assert bool(told) == (hosting == "uvicorn" or not case.needs_keys)
    broken = [f"under {recipe}: {why}" for recipe, why in told.items() if why is not None]
    assert not broken, "\n".join(broken)


def test_every_rule_is_checked_under_every_recipe_here_and_once_on_each_other_hosting() -> None:
    assert len(CASES) == len({str(case) for case in CASES}) >= 150
    full, *others = (chosen(hosting) for hosting in HOSTINGS)
    assert {recipe: sorted(case.rule for case in CASES if recipe in case.recipes) for recipe in (*JS, *PYTHON)} == {
        recipe: sorted(rules) for recipe, rules in full.items()
    }
    for some in others:
        for recipes in (JS, PYTHON):
            rules = [rule for recipe in recipes for rule in some[recipe] if not rule.startswith("every-")]
            client = "javascript" if recipes == JS else "python"
            assert sorted(rules) == sorted(
                case.rule for case in CASES if case.client == client and not (case.needs_keys or case.rule.startswith("every-"))
            )
