"""An endpoint that is added with one schema module, one engine folder, one line in each registry and one block in the YAML."""

import io

import av
import httpx

from deployments.cli.client import QueueClient
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
