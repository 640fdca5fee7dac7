"""A small run of `python -m tests.wire.lost_answers`."""

from deployments.jobs.store import JobStore
from tests.wire.lost_answers import by_javascript, by_python, seeds_told, without_keys
from tests.wire.page import PageClient
from tests.wire.service import Wire

N = 30


async def test_every_python_caller_gets_the_one_job_of_its_own(base_url: str, store: JobStore, wire: Wire) -> None:
    told = await by_python(base_url, wire, N)
    assert (told.cut, told.posts) == (N, 2 * N)
    assert await seeds_told(store, told.ids) == list(range(N))


async def test_every_javascript_caller_gets_the_one_job_of_its_own(page: PageClient, store: JobStore, wire: Wire) -> None:
    told = await by_javascript(page.base_url, wire, N)
    assert (told.cut, told.posts) == (N, 2 * N)
    assert await seeds_told(store, told.ids) == list(range(N))


async def test_equal_submissions_without_a_key_are_a_job_each(base_url: str, store: JobStore) -> None:
    assert await seeds_told(store, await without_keys(base_url, N)) == [1] * N
