"""Our OpenAPI documents: what they say, and that the service keeps to it whatever it is sent."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from deployments.ingress.app import create_app
from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from tests.deployments.ingress.fuzz import Fuzzed, fuzzed, try_all

DOCUMENT = "/api/openapi/queue/openapi.json"


@pytest.fixture
def target(database: str, tmp_path: Path) -> Iterator[Fuzzed]:
    with fuzzed(database, tmp_path) as made:
        yield made


def document(target: Fuzzed, path: str, **query: str) -> dict[str, Any]:
    response = target.run(target.client.get(path, params=query))
    assert response.status_code == 200
    made: dict[str, Any] = response.json()
    return made


def test_no_request_after_our_own_schema_gets_a_5xx_or_an_answer_outside_of_it(target: Fuzzed):
    seen = try_all(target, document(target, "/openapi.json"), 12)
    assert len(seen) > 15
    answered = set().union(*seen.values())
    assert {200, 202, 400, 404, 422} <= answered
    for endpoint in ENDPOINTS:
        assert seen[f"POST /queue/{endpoint}"] >= {200, 422}, "some were queued and some refused"
        assert seen[f"GET /queue/{endpoint}/requests/{{request_id}}"] & {200, 422, 499}, "some were of jobs that there are"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoints_own_document_is_fals_and_is_kept_to(target: Fuzzed, endpoint: str):
    made = document(target, DOCUMENT, endpoint_id=endpoint)
    name = ENDPOINTS[endpoint].input.__name__.removesuffix("Input")
    assert made["openapi"] == "3.0.4"
    assert made["info"]["title"] == f"Queue OpenAPI for {endpoint}"
    assert made["info"]["x-fal-metadata"]["endpointId"] == endpoint
    requests = f"/{endpoint}/requests/{{request_id}}"
    assert list(made["paths"]) == [f"/{endpoint}", *(requests + rest for rest in ("", "/status", "/status/stream", "/cancel"))]
    fields = made["components"]["schemas"][f"{name}Input"]
    assert fields["x-fal-order-properties"] == list(fields["properties"]) == list(ENDPOINTS[endpoint].input.model_fields)
    status = made["components"]["schemas"]["QueueStatus"]["properties"]["status"]
    assert status["enum"] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert made["servers"] == [{"url": "http://localhost/queue"}]
    assert '"null"' not in str(made).replace("'", '"'), "OpenAPI 3.0 has no such type"
    prefixed = {f"/queue{path}": item for path, item in made["paths"].items() if path.endswith("/status")}
    try_all(target, made | {"paths": prefixed}, 10)


def test_the_services_document_describes_each_object_in_order(target: Fuzzed):
    made = document(target, "/openapi.json")
    assert made["x-fal-order-paths"] == list(made["paths"])
    objects = [each for each in made["components"]["schemas"].values() if "properties" in each]
    assert objects
    assert all(each["x-fal-order-properties"] == list(each["properties"]) for each in objects)
    assert not [path for path in made["paths"] if "{app" in path], "each endpoint has paths of its own"
    realtime = [path for path, item in made["paths"].items() if item.get("x-fal-protocol", {}).get("type") == "realtime"]
    assert realtime == [f"/run/{endpoint}/realtime" for endpoint, each in ENDPOINTS.items() if each.realtime]
    scribble = made["components"]["schemas"]["AnimateDiffInput"]["properties"]["keyframe_0_image_url"]
    assert scribble["ui"] == {"field": "image", "important": False}


async def test_an_endpoint_that_is_left_out_is_not_described(tmp_path: Path):
    import httpx

    from deployments.ingress.app import create_app

    app = create_app(Settings(home=tmp_path, controlnext=None), "postgresql://postgres@127.0.0.1:1/nobody")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert not [path for path in (await client.get("/openapi.json")).json()["paths"] if "controlnext" in path]
        assert (await client.get(DOCUMENT, params={"endpoint_id": "fal-ai/controlnext"})).status_code == 404
        assert (await client.get(DOCUMENT)).status_code == 404


def test_the_manual_lists_every_path_and_no_other(tmp_path: Path):
    app = create_app(Settings(home=tmp_path), "postgresql://nobody@127.0.0.1:1/nowhere")
    routes = {
        (method, re.sub(r"{.*?}", "<>", route.path.removeprefix("/cdn")))
        for route in iter_route_contexts(app.routes)
        for method in route.methods or ["WebSocket"]
    }
    manual = Path("deployments/README.md").read_text().partition("## Every path\n")[2].partition("\n## ")[0]
    listed = set[tuple[str, str]]()
    for methods, paths in re.findall(r"^\| ([A-Za-z, ]+) \| (`/.*?`) \|", manual, re.MULTILINE):
        for path in re.findall(r"`(.*?)`", paths):
            served = [path.replace("<endpoint>", endpoint) for endpoint in ENDPOINTS] if "<endpoint>" in path else [path]
            listed |= {(method, re.sub("<.*?>", "<>", each)) for method in methods.split(", ") for each in served}
    slashes = {(method, f"{path}/") for method, path in listed if path.startswith(("/queue/", "/run/"))}
    assert listed <= routes
    assert routes - listed <= slashes
