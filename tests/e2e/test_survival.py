"""What a restart, a killed replica, a decoder that never ends and the death of everything leave of the jobs.

The first test kills the service as it ships; it comes back with settings for the others. A start takes half a minute.
"""

import asyncio
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from deployments.cli.client import QueueClient
from deployments.files.file_store import FileStore
from deployments.hosting.embedded_postgres import database_url
from deployments.jobs.store import JobStore
from deployments.settings import Settings
from tests.deployments.dispatch.test_dispatcher import dispatching, ended
from tests.deployments.dispatch.test_resume import mp4_of as stored_mp4
from tests.e2e.endless import ENDLESS_SEED
from tests.e2e.service import Service, gateway
from tests.e2e.test_service import ENDPOINT, finished, wait_for_step
from tests.fakes import LocalStages

STEPS = 24
LONG = {"prompt": "a red ball", "num_inference_steps": STEPS, "guidance_scale": 2, "seed": 11}
"""Some seconds of work."""
QUEUE = {"checkpoint_s": 0.2, "lease_s": 3, "max_in_flight": 1}


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> bytes:
    """The video that `LONG` asks for."""
    with QueueClient(service.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        finished(client, request_id)
        return mp4_of(client, request_id)


@pytest.fixture
def short_leases(service: Service) -> Service:
    """The service with the settings of these tests."""
    if service.running and service.queue != QUEUE:
        assert service.stop() == 0
    if not service.running:
        start_with_short_leases(service)
    return service


def start_with_short_leases(service: Service) -> None:
    service.queue, service.without, service.import_path = QUEUE, ("controlnext", "solid"), "tests.e2e.endless:build"
    service.start()


def wait_for_steps(client: QueueClient, request_id: str, steps: int) -> None:
    for status in client.follow(ENDPOINT, request_id):
        if max(steps_told(status["logs"] or []), default=0) >= steps:
            return


def mp4_of(client: QueueClient, request_id: str) -> bytes:
    return client.download(client.result(ENDPOINT, request_id)["video"]["url"])


def resumed_at(lines: list[dict[str, Any]]) -> int:
    """The step at which the last attempt began. No step before it was done again."""
    told = [line["message"] for line in lines]
    last = max(i for i, line in enumerate(told) if line.startswith("resumed at step"))
    step = int(told[last].removeprefix("resumed at step ").partition("/")[0])
    after = steps_told(lines[last:])
    assert after == sorted(after)
    assert (after[0], after[-1]) == (step, STEPS)
    return step


def steps_told(lines: list[dict[str, Any]]) -> list[int]:
    return [line["progress"]["step"]["done"] for line in lines if "step" in line.get("progress", {})]


def test_after_sigkill_of_everything_each_job_completes_once_and_a_gateway_takes_more_meanwhile(service: Service):
    with QueueClient(service.url) as client:
        done = client.submit(ENDPOINT, {"prompt": "a", "num_inference_steps": 1})
        finished(client, done)
        ids = [client.submit(ENDPOINT, LONG | {"seed": 0})]
        ids += [client.submit(ENDPOINT, {"prompt": "a", "seed": seed}) for seed in range(1, 6)]
        wait_for_step(client, ids[0])
        states = [client.status(ENDPOINT, request_id)["status"] for request_id in ids]
        assert (states[0], states[-1]) == ("IN_PROGRESS", "IN_QUEUE")
    service.kill()
    with gateway(service) as url, QueueClient(url) as client:
        ids.append(client.submit(ENDPOINT, {"prompt": "a", "seed": 6}))
        states.append(client.status(ENDPOINT, ids[-1])["status"])
        assert states[-1] == "IN_QUEUE"
        video = client.result(ENDPOINT, done)["video"]
        assert len(client.download(video["url"])) == video["file_size"]
    start_with_short_leases(service)
    with QueueClient(service.url) as client:
        for seed, request_id in enumerate(ids):
            assert "error" not in finished(client, request_id)
            assert client.result(ENDPOINT, request_id)["seed"] == seed
            assert client.download(client.result(ENDPOINT, request_id)["video"]["url"])
    once, again = ["queued", "running", "succeeded"], ["queued", "running", "queued", "running", "succeeded"]
    histories = [[state for state, _ in asyncio.run(events(service, request_id))] for request_id in ids]
    assert histories[0] == again
    for state, told in zip(states, histories, strict=True):
        assert told == once or (told == again and state == "IN_PROGRESS")


def test_a_cancelled_decode_makes_room_for_the_next(short_leases: Service):
    with QueueClient(short_leases.url) as client:
        for _ in range(2):
            request_id = client.submit(ENDPOINT, {"prompt": "a", "num_inference_steps": 1, "seed": ENDLESS_SEED})
            wait_for_step(client, request_id, "frame")  # of the second: so the first has given up its turn
            client.cancel(ENDPOINT, request_id)
            assert finished(client, request_id)["error_type"] == "client_cancelled"


def test_a_killed_replica_costs_its_job_no_attempt_and_no_step_that_it_reported(short_leases: Service, undisturbed: bytes):
    with QueueClient(short_leases.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        wait_for_steps(client, request_id, 8)
        (replica,) = short_leases.processes("animatediff-denoise")
        replica.kill()
        status = finished(client, request_id)
        assert mp4_of(client, request_id) == undisturbed
    told = steps_told(status["logs"])
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, STEPS)
    assert [event for event in asyncio.run(events(short_leases, request_id)) if event[0] != "queued"] == [
        ("running", 1),
        ("succeeded", 1),
    ]


def test_a_killed_sampler_costs_its_job_an_attempt_and_no_step_before_its_checkpoint(short_leases: Service, undisturbed: bytes):
    with QueueClient(short_leases.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        wait_for_steps(client, request_id, 8)
        (sampler,) = short_leases.processes(":sampler")
        sampler.kill()
        status = finished(client, request_id)
        assert mp4_of(client, request_id) == undisturbed
    assert resumed_at(status["logs"]) > 0
    told = [event for event in asyncio.run(events(short_leases, request_id)) if event[0] != "queued"]
    assert told == [("running", 1), ("running", 2), ("succeeded", 2)]


async def test_a_job_is_released_at_sigterm_and_resumed_at_its_last_step_with_the_same_bits_by_any_dispatcher(
    short_leases: Service, undisturbed: bytes
):
    with QueueClient(short_leases.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        wait_for_steps(client, request_id, 8)
    assert short_leases.stop() == 0
    before, after, video = await rendered_here(short_leases, UUID(request_id))
    assert video == undisturbed
    assert resumed_at(after) >= max(8, *steps_told(before)), "the last one was kept"
    assert await events(short_leases, request_id) == [
        ("queued", 0),
        ("running", 1),
        ("queued", 0),  # at no cost to its attempts
        ("running", 1),
        ("succeeded", 1),
    ]


Lines = list[dict[str, Any]]


async def rendered_here(service: Service, job_id: UUID) -> tuple[Lines, Lines, bytes]:
    """A job of a stopped service, by a dispatcher in this process. Returns its log before, its whole log, and its video."""
    settings = service.settings
    store, files = await JobStore.open(await asyncio.to_thread(database_url, settings)), FileStore(settings.files_url)
    try:
        before = await log(store, job_id)
        async with dispatching(store, files, LocalStages(settings), settings.queue):
            job = await ended(store, job_id)
        return before, await log(store, job_id), await stored_mp4(files, job)
    finally:
        await store.close()


async def log(store: JobStore, job_id: UUID) -> Lines:
    return [{"message": line.message, "progress": line.progress or {}} for line in await store.logs(job_id)]


async def events(service: Service, request_id: str) -> list[tuple[str, int]]:
    """The states that a job went through, and the attempts that they counted."""
    connection = await asyncpg.connect(await asyncio.to_thread(database_url, Settings(home=service.home)))
    try:
        rows = await connection.fetch("SELECT state, attempt FROM job_events WHERE job_id = $1 ORDER BY id", UUID(request_id))
    finally:
        await connection.close()
    return [(row["state"], row["attempt"]) for row in rows]
