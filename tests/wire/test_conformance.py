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
from tests.wire.conformance import JS, Outcomes, declared, outcomes
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
            yield asyncio.run(outcomes(host, host.settings.database, Path(home), tls))
            asyncio.run(execute(host.settings.database, "TRUNCATE jobs CASCADE"))
            return
        name = f"conformance_{uuid4().hex}"
        asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
        yield asyncio.run(outcomes(None, of_database(postgres, name), Path(home), tls))
        asyncio.run(execute(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.parametrize(("recipe", "rule", "needs_keys"), CASES, ids=[f"{recipe}-{rule}" for recipe, rule, _ in CASES])
def test_rule(found: Outcomes, hosting: str, recipe: str, rule: str, needs_keys: bool) -> None:
    if needs_keys and hosting != "uvicorn":
        assert rule not in found[recipe]
    else:
        assert found[recipe][rule] is None, found[recipe][rule]


def test_there_are_enough_rules() -> None:
    rules = {(recipe in JS, rule) for recipe, rule, _ in CASES}
    assert len(rules) >= 150
    assert len(CASES) == len(set(CASES))
