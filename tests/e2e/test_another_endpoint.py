"""An endpoint that is added with one schema module, one engine folder, one line in each registry and one block in the YAML."""

import asyncio
import io
import json
import os
import sys
from collections.abc import Callable

import asyncpg
import av
import httpx

from deployments.cli.client import QueueClient
from deployments.hosting.embedded_postgres import database_url
from deployments.settings import Settings
from tests.conftest import connected, execute
from tests.deployments.dispatch.test_backlog import END_CONNECTIONS
from tests.e2e.service import Service
from tests.e2e.third.added import ENDPOINT
from tests.patience import PATIENCE_S


def test_a_third_endpoint_is_served_like_the_others(service: Service):
    with QueueClient(service.url) as client:
        request_id = client.submit(ENDPOINT, {"grey": 200, "seed": 5, "unknown": 1})
        *_, status = client.follow(ENDPOINT, request_id)
        assert "error" not in status
        assert [line["message"] for line in status["logs"]] == ["ignored, because this endpoint has no such fields: unknown"]
        output = client.result(ENDPOINT, request_id)
        mp4 = client.download(output["video"]["url"])
    assert output["seed"] == 5
    with av.open(io.BytesIO(mp4)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5, "as the block in the YAML says"
    assert all(abs(float(frame.mean()) - 200) < 3 for frame in frames)
    refused = httpx.post(f"{service.url}/queue/{ENDPOINT}", json={"grey": 256}, timeout=PATIENCE_S)
    assert refused.json()["detail"][0]["loc"] == ["body", "grey"]
    document = f"{service.url}/api/openapi/queue/openapi.json?endpoint_id={ENDPOINT}"
    described = httpx.get(document, timeout=PATIENCE_S).json()
    assert described["components"]["schemas"]["SolidInput"]["properties"]["grey"]["maximum"] == 255
    listed = httpx.get(f"{service.url}/v1/models", timeout=PATIENCE_S).json()["models"]
    assert ENDPOINT in {model["endpoint_id"] for model in listed}


async def test_a_stage_is_scaled_from_nothing_to_what_its_jobs_need_and_back(service: Service):
    database = await asyncpg.connect(database_url(Settings(home=service.home)))

    async def until(true: Callable[[int, int], bool]) -> None:
        statement = "SELECT replicas, target FROM stages WHERE endpoint = $1 AND stage = 'denoise'"
        async with asyncio.timeout(60):
            while (row := await database.fetchrow(statement, ENDPOINT)) is None or not true(*row):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    try:
        await until(lambda replicas, target: replicas == target == 0)
        with QueueClient(service.url) as client:
            jobs = [client.submit(ENDPOINT, {"grey": level}) for level in (1, 2, 3)]
            await until(lambda replicas, target: target == 2)
            for request_id in jobs:
                *_, status = client.follow(ENDPOINT, request_id)
                assert "error" not in status
        await until(lambda replicas, target: replicas == target == 0)
    finally:
        await database.close()


async def test_other_applications_deploy_while_the_policy_has_nonsense_and_no_database(service: Service):
    """Serve calls the policy in the loop that deploys every application; see `dispatch/autoscaling.py`."""
    (raylet,) = service.processes("raylet/raylet ")
    gcs = next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address="))
    url = database_url(Settings(home=service.home))
    await execute(url, "UPDATE stages SET unit_s = 'NaN', ready_s = '-Infinity', backlog_s = 'Infinity', replicas = -1")
    await execute(url, "UPDATE jobs SET units = '{NaN,-Infinity,1e300}', parallel = -1 WHERE finished_at IS NOT NULL")
    async with connected(url.replace("/postgres?", "/template1?")) as beside:
        await beside.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS false")
        try:
            await beside.execute(END_CONNECTIONS.format("postgres"))
            deploying = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "ignore", "-m", "tests.e2e.another_application", gcs),
                stdout=asyncio.subprocess.PIPE,
                cwd=service.root,
                env=os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": str(service.root)},
            )
            printed, _ = await asyncio.wait_for(deploying.communicate(), PATIENCE_S)
        finally:
            await beside.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS true")
    answer, before, after = json.loads(printed.splitlines()[-1])
    assert answer == "deployed"
    before, after = ({name: states.get("RUNNING", 0) for name, states in each.items()} for each in (before, after))
    assert before == after
    assert (before["controlnext-denoise"], before["solid-denoise"]) == (2, 0)
