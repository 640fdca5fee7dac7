"""The status stream as a browser's EventSource reads it, over a real connection."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest

from deployments.jobs.job import Claim, NewJob
from deployments.jobs.store import JobStore
from tests.patience import PATIENCE_S
from tests.wire.service import ENDPOINT, LEASE_S, Wire


@dataclass
class Event:
    id: str | None
    data: dict[str, Any]

    @property
    def messages(self) -> list[str]:
        return [item["message"] for item in self.data["logs"]]

    @property
    def seqs(self) -> list[int]:
        return [item["seq"] for item in self.data["logs"]]


@pytest.fixture
async def claim(store: JobStore) -> Claim:
    await store.submit(NewJob(ENDPOINT, {"prompt": "a", "seed": 1}))
    return await claimed(store)


async def claimed(store: JobStore) -> Claim:
    claim = await store.claims.take([ENDPOINT], LEASE_S)
    assert claim is not None
    return claim


@asynccontextmanager
async def streaming(
    base_url: str, job_id: UUID, last_event_id: str | None = None, logs: int = 1
) -> AsyncIterator[AsyncIterator[Event]]:
    headers = {} if last_event_id is None else {"last-event-id": last_event_id}
    path = f"/queue/{ENDPOINT}/requests/{job_id}/status/stream?logs={logs}"
    async with (
        asyncio.timeout(PATIENCE_S),
        httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http,
        http.stream("GET", path, headers=headers) as response,
    ):
        assert response.status_code == 200
        yield events(response)


async def events(response: httpx.Response) -> AsyncIterator[Event]:
    event_id = None
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            yield Event(event_id, json.loads(line.removeprefix("data: ")))
            event_id = None


async def test_an_events_id_is_the_number_of_its_last_line(base_url: str, store: JobStore, claim: Claim) -> None:
    async with streaming(base_url, claim.job_id) as stream:
        first = await anext(stream)
        assert (first.id, first.messages) == (None, [])
        await store.claims.log(claim, "one")
        second = await anext(stream)
        assert (second.id, second.messages) == ("1", ["one"])
        await store.claims.log(claim, "two")
        await store.claims.succeed(claim, {}, {})
        rest = [event async for event in stream]
    assert [message for event in rest for message in event.messages] == ["two"]
    assert (rest[-1].id, rest[-1].data["status"]) == ("2", "COMPLETED")


@pytest.mark.parametrize(("seen", "new"), [("1", ["two", "three"]), ("3", []), (None, ["one", "two", "three"])])
async def test_a_reconnecting_client_gets_only_new_lines(
    base_url: str, store: JobStore, claim: Claim, seen: str | None, new: list[str]
) -> None:
    for message in ("one", "two", "three"):
        await store.claims.log(claim, message)
    async with streaming(base_url, claim.job_id, seen) as stream:
        first = await anext(stream)
        assert (first.id, first.messages) == ("3", new)
        await store.claims.log(claim, "four")
        assert (await anext(stream)).messages == ["four"]
        await store.claims.succeed(claim, {}, {})
    async with streaming(base_url, claim.job_id, "4") as stream:
        [last] = [event async for event in stream]
    assert (last.data["status"], last.messages) == ("COMPLETED", [])


@pytest.mark.parametrize("nonsense", ["", "x", "-1", "1.5", "9" * 40, "²"])
async def test_an_event_id_that_is_not_ours_is_ignored(base_url: str, store: JobStore, claim: Claim, nonsense: str) -> None:
    await store.claims.log(claim, "one")
    await store.claims.succeed(claim, {}, {})
    headers = {"last-event-id": nonsense.encode()}
    async with httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S) as http:
        answer = await http.get(f"/queue/{ENDPOINT}/requests/{claim.job_id}/status/stream?logs=1", headers=headers)
    assert (answer.status_code, answer.text.count('"message": "one"')) == (200, 1)


async def test_a_job_that_logs_fast_wakes_a_stream_a_few_times_a_second(base_url: str, store: JobStore, claim: Claim) -> None:
    async with streaming(base_url, claim.job_id) as stream:
        assert (await anext(stream)).messages == []
        began = asyncio.get_running_loop().time()
        for k in range(400):
            await store.claims.log(claim, f"line {k}")
        await store.claims.succeed(claim, {}, {})
        rest = [event async for event in stream]
        took = asyncio.get_running_loop().time() - began
    assert [message for event in rest for message in event.messages] == [f"line {k}" for k in range(400)]
    assert len(rest) <= took / 0.2 + 3


async def test_the_end_is_told_at_once(base_url: str, store: JobStore, claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.ingress.status_stream.STREAM_PAUSE_S", 60.0)
    async with streaming(base_url, claim.job_id) as stream:
        await anext(stream)
        await store.claims.log(claim, "one")
        await store.claims.succeed(claim, {}, {})
        [last] = [event async for event in stream]
    assert (last.data["status"], last.messages) == ("COMPLETED", ["one"])


async def test_no_line_is_told_twice_or_left_out_over_retries_and_a_full_log(
    wire: Wire, base_url: str, store: JobStore, claim: Claim
) -> None:
    said = 0

    async def work() -> None:
        nonlocal said
        held = claim
        while said < 2100:
            for _ in range(300):
                said += 1
                await store.claims.log(held, f"line {said}")
            await store.claims.requeue(held, "the runner died", counted=False)
            held = await claimed(store)
        await store.claims.succeed(held, {}, {})

    seqs: list[int] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(work())
        last_id = None
        while True:
            async with streaming(base_url, claim.job_id, last_id) as stream:
                ended = False
                async for event in stream:
                    seqs += event.seqs
                    last_id = event.id or last_id
                    ended = event.data["status"] == "COMPLETED"
                    if len(event.seqs) > 100:
                        break  # connect again
            if ended:
                break
    assert seqs == list(range(1, 2002))


async def test_a_stream_without_logs_has_no_ids_and_sleeps_through_lines(base_url: str, store: JobStore, claim: Claim) -> None:
    async with streaming(base_url, claim.job_id, logs=0) as stream:
        first = await anext(stream)
        for k in range(10):
            await store.claims.log(claim, f"line {k}")
        await store.claims.succeed(claim, {}, {})
        rest = [event async for event in stream]
    assert [event.id for event in (first, *rest)] == [None, None]
    assert [event.data["logs"] for event in (first, *rest)] == [None, None]
