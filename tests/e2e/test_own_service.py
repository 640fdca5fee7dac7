"""What would disturb others: the death of the whole service, and a decoder that never ends."""

import asyncio
from uuid import UUID

import asyncpg
import pytest

from deployments.cli.client import QueueClient
from deployments.hosting.embedded_postgres import database_url
from deployments.settings import Settings
from tests.e2e.endless import ENDLESS_SEED
from tests.e2e.service import Service, gateway
from tests.e2e.test_service import ENDPOINT, LONG, finished, wait_for_step


def test_a_cancelled_decode_makes_room_for_the_next(own_service: Service):
    with QueueClient(own_service.url) as client:
        for _ in range(2):
            request_id = client.submit(ENDPOINT, {"prompt": "a", "num_inference_steps": 1, "seed": ENDLESS_SEED})
            wait_for_step(client, request_id, "frame")  # of the second: so the first has given up its turn
            client.cancel(ENDPOINT, request_id)
            assert finished(client, request_id)["error_type"] == "client_cancelled"


@pytest.mark.timeout(400)  # the service starts twice
def test_after_sigkill_of_everything_each_job_completes_once_and_a_gateway_takes_more_meanwhile(
    own_service: Service, settings: Settings
):
    with QueueClient(own_service.url) as client:
        done = client.submit(ENDPOINT, {"prompt": "a", "num_inference_steps": 1})
        finished(client, done)
        ids = [client.submit(ENDPOINT, LONG | {"seed": 0})]
        ids += [client.submit(ENDPOINT, {"prompt": "a", "seed": seed}) for seed in range(1, 6)]
        wait_for_step(client, ids[0])
        states = [client.status(ENDPOINT, request_id)["status"] for request_id in ids]
        assert states == ["IN_PROGRESS"] + ["IN_QUEUE"] * 5
    own_service.kill()
    with gateway(own_service) as url, QueueClient(url) as client:
        ids.append(client.submit(ENDPOINT, {"prompt": "a", "seed": 6}))
        assert client.status(ENDPOINT, ids[-1])["status"] == "IN_QUEUE"
        video = client.result(ENDPOINT, done)["video"]
        assert len(client.download(video["url"])) == video["file_size"]
    own_service.start()
    with QueueClient(own_service.url) as client:
        for seed, request_id in enumerate(ids):
            assert "error" not in finished(client, request_id)
            assert client.result(ENDPOINT, request_id)["seed"] == seed
            assert client.download(client.result(ENDPOINT, request_id)["video"]["url"])
    histories = [asyncio.run(history(database_url(settings), request_id)) for request_id in ids]
    assert histories == [["queued", "running", "queued", "running", "succeeded"], *[["queued", "running", "succeeded"]] * 6]


async def history(url: str, request_id: str) -> list[str]:
    """The states that a job went through, in order."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT state FROM job_events WHERE job_id = $1 ORDER BY id", UUID(request_id))
    finally:
        await connection.close()
    return [row["state"] for row in rows]
