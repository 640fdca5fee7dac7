"""What a restart and a killed replica leave of a job's work: all but the steps since its last checkpoint."""

import asyncio
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from deployments.cli.client import QueueClient
from deployments.hosting.embedded_postgres import database_url
from deployments.settings import Settings
from tests.e2e.service import Service
from tests.e2e.test_service import ENDPOINT, finished

STEPS = 50
LONG = {"prompt": "a red ball", "num_inference_steps": STEPS, "guidance_scale": 2, "seed": 11}
"""Some seconds of work."""


@pytest.fixture(scope="module")
def undisturbed(own_service: Service) -> bytes:
    with QueueClient(own_service.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        finished(client, request_id)
        return mp4_of(client, request_id)


def wait_for_steps(client: QueueClient, request_id: str, steps: int) -> None:
    for status in client.follow(ENDPOINT, request_id):
        if max(steps_told(status["logs"] or []), default=0) >= steps:
            return


def mp4_of(client: QueueClient, request_id: str) -> bytes:
    return client.download(client.result(ENDPOINT, request_id)["video"]["url"])


def resumed_at(status: dict[str, Any]) -> int:
    """The step at which the last attempt began. No step before it was done again."""
    told = [line["message"] for line in status["logs"]]
    last = max(i for i, line in enumerate(told) if line.startswith("resumed at step"))
    step = int(told[last].removeprefix("resumed at step ").partition("/")[0])
    after = steps_told(status["logs"][last:])
    assert after == sorted(after)
    assert (after[0], after[-1]) == (step, STEPS)
    return step


def steps_told(lines: list[dict[str, Any]]) -> list[int]:
    return [line["progress"]["step"]["done"] for line in lines if "step" in line.get("progress", {})]


def test_a_job_whose_replica_is_killed_is_resumed_with_the_same_bits(own_service: Service, undisturbed: bytes):
    with QueueClient(own_service.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        wait_for_steps(client, request_id, 8)
        (replica,) = own_service.processes("animatediff-denoise")
        replica.kill()
        status = finished(client, request_id)
        assert mp4_of(client, request_id) == undisturbed
    assert resumed_at(status) > 0


@pytest.mark.timeout(400)  # the service starts twice
def test_a_job_is_released_at_sigterm_and_resumed_at_its_last_step_with_the_same_bits(
    own_service: Service, settings: Settings, undisturbed: bytes
):
    with QueueClient(own_service.url) as client:
        request_id = client.submit(ENDPOINT, LONG)
        wait_for_steps(client, request_id, 8)
    assert own_service.stop() == 0
    own_service.start()
    with QueueClient(own_service.url) as client:
        status = finished(client, request_id)
        assert mp4_of(client, request_id) == undisturbed
    resumed = next(i for i, line in enumerate(status["logs"]) if line["message"].startswith("resumed"))
    assert resumed_at(status) >= max(8, *steps_told(status["logs"][:resumed])), "the last one was kept"
    assert asyncio.run(events(database_url(settings), request_id)) == [
        ("queued", 0),
        ("running", 1),
        ("queued", 0),  # at no cost to its attempts
        ("running", 1),
        ("succeeded", 1),
    ]


async def events(url: str, request_id: str) -> list[tuple[str, int]]:
    """The states that a job went through, and the attempts that they counted."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT state, attempt FROM job_events WHERE job_id = $1 ORDER BY id", UUID(request_id))
    finally:
        await connection.close()
    return [(row["state"], row["attempt"]) for row in rows]
