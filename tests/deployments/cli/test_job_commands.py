import asyncio
import re
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from deployments.cli.commands.job_commands import age
from deployments.jobs.job import NewJob
from deployments.jobs.store import JobStore
from tests.conftest import TEMPLATE, drop, execute, of_database
from tests.deployments.cli.test_main import config, run

ANIMATEDIFF, CONTROLNEXT = "fal-ai/animatediff-sparsectrl-lcm", "fal-ai/controlnext"


async def filled(url: str) -> dict[str, UUID]:
    """Fills a database with three jobs. Returns their ids by name."""
    store = await JobStore.open(url)
    ids = {}
    for name, endpoint in (("retried", ANIMATEDIFF), ("cancelled", CONTROLNEXT), ("waiting", ANIMATEDIFF)):
        ids[name] = (await store.submit(NewJob(endpoint, {}, max_attempts=3))).id
        await asyncio.sleep(0.002)  # ids made in the same millisecond have no order
    for outcome in ("the runner died", None):
        claim = await store.claims.take([ANIMATEDIFF], 60)
        assert claim is not None
        assert claim.job_id == ids["retried"]
        await (store.claims.requeue(claim, outcome, counted=True) if outcome else store.claims.succeed(claim, {}, {}))
    await store.request_cancel(ids["cancelled"])
    await store.close()
    return ids


@pytest.fixture(scope="module")
def service(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, UUID], list[object]]]:
    """A service's jobs, and the command-line options that select the service."""
    name = f"timelines_{uuid4().hex}"
    asyncio.run(execute(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}"))
    url = of_database(postgres, name)
    yield asyncio.run(filled(url)), ["--config", config(tmp_path_factory.mktemp("service"), database=url)]
    asyncio.run(drop(postgres, name))


def test_a_timeline_has_every_state_with_its_attempt_and_reason(service: tuple[dict[str, UUID], list[object]]):
    ids, options = service
    done = run("jobs", "show", ids["retried"], *options)
    assert done.exit_code == 0, done.output
    first, *rows = done.stdout.splitlines()
    assert first == f"{ANIMATEDIFF}: succeeded"
    cells = [[cell.strip() for cell in row.split("│")[3:6]] for row in rows if row.startswith("│")]
    assert cells == [
        ["queued", "", ""],
        ["running", "1", ""],
        ["queued", "1", "the runner died"],
        ["running", "2", ""],
        ["succeeded", "2", ""],
    ]


def test_a_job_that_ended_without_a_result_says_why(service: tuple[dict[str, UUID], list[object]]):
    ids, options = service
    assert run("jobs", "show", ids["cancelled"], *options).stdout.startswith(f"{CONTROLNEXT}: cancelled, ")


def test_an_unknown_job_is_told_in_one_sentence(service: tuple[dict[str, UUID], list[object]]):
    _, options = service
    unknown = run("jobs", "show", UUID(int=0), *options)
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert unknown.stderr == f"there is no job {UUID(int=0)}; if there was one, its retention has ended\n"
    assert run("jobs", "show", "x", *options).stderr == "x is not a request's id\n"


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ([], ["waiting", "cancelled", "retried"]),
        (["--limit", 2], ["waiting", "cancelled"]),
        (["--endpoint", "controlnext"], ["cancelled"]),
        (["--state", "succeeded"], ["retried"]),
        (["--endpoint", CONTROLNEXT, "--state", "queued"], []),
    ],
)
def test_recent_jobs_are_listed_newest_first(
    service: tuple[dict[str, UUID], list[object]], filters: list[object], names: list[str]
):
    ids, options = service
    done = run("jobs", "list", *filters, *options)
    assert done.exit_code == 0, done.output
    header, *rows = [re.split(r"  +", row) for row in done.stdout.splitlines()]
    assert header == ["id", "state", "age", "attempts", "endpoint"]
    assert [row[0] for row in rows] == [str(ids[name]) for name in names]
    known = {
        "waiting": ["queued", "0 of 3", ANIMATEDIFF],
        "cancelled": ["cancelled", "0 of 3", CONTROLNEXT],
        "retried": ["succeeded", "2 of 3", ANIMATEDIFF],
    }
    assert [[row[1], *row[3:]] for row in rows] == [known[name] for name in names]
    assert all(re.fullmatch(r"\d+ (s|min)", row[2]) for row in rows)


@pytest.mark.parametrize("wrong", [["--state", "done"], ["--endpoint", "stable-video"], ["--limit", 0]])
def test_what_cannot_be_listed_is_refused(service: tuple[dict[str, UUID], list[object]], wrong: list[object]):
    assert run("jobs", "list", *wrong, *service[1]).exit_code == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86_400, "1 d"), (900_000, "10 d")]
)
def test_an_age_is_told_in_its_largest_unit(seconds: float, text: str):
    assert age(timedelta(seconds=seconds)) == text
