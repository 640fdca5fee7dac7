"""The OpenAPI documents: of one endpoint's queue, as fal publishes one for each of its own, and of the whole service.

Everything in them follows from the endpoints' pydantic models and from the routes. fal-queue-protocol.md, section 7.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from deployments.schemas import answers
from deployments.schemas.description import Endpoint
from deployments.schemas.responses import app_id

REFERENCE = "#/components/schemas/"
SECURITY = {
    "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Key <id>:<secret>"},
}
_REQUEST_ID = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
_LOGS = {
    "name": "logs",
    "in": "query",
    "required": False,
    "description": "1 for the log lines.",
    "schema": {"type": "number", "title": "Include logs"},
}
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON."}, "id": {"type": "string"}},
    "required": ["data"],
}
"""One server-sent event."""
_METHODS = ("get", "put", "post", "delete", "head", "patch")


def queue_document(endpoint: Endpoint, queue_url: str, service_url: str) -> dict[str, Any]:
    """One endpoint's queue, in OpenAPI 3.0. The URLs are without a slash at the end."""
    document = {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {endpoint.id}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {endpoint.id} queue.",
            "x-fal-metadata": {
                "endpointId": endpoint.id,
                "category": endpoint.category,
                "thumbnailUrl": "",
                "playgroundUrl": f"{service_url}/",
                "documentationUrl": f"{service_url}/docs",
                "about": endpoint.description,
            },
        },
        "paths": endpoint_paths(endpoint, "", endpoint.id),
        "components": {"securitySchemes": SECURITY, "schemas": schemas([endpoint])},
        "servers": [{"url": queue_url}],
        "security": [{"apiKeyAuth": []}],
    }
    return dict(_in_3_0(document))


def service_document(document: dict[str, Any], endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The service in OpenAPI 3.1. document: what FastAPI says of the routes that are not an endpoint's."""
    endpoints = list(endpoints)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths |= endpoint_paths(endpoint, "/queue", app_id(endpoint.id)) | run_paths(endpoint)
    paths |= document.get("paths", {})
    for item in paths.values():
        for method in _METHODS:
            if operation := item.get(method):
                answered = operation["responses"]
                answered.pop("422", None)  # FastAPI's own: our routes validate by themselves, in fal's shape
                answered.setdefault("default", _answer("Failure", "A failure."))
    components = document.get("components", {})
    named = {name: each for name, each in components.get("schemas", {}).items() if name not in _FASTAPIS_OWN}
    named = {name: _ordered(each) for name, each in named.items()} | schemas(endpoints)
    return {
        **document,
        "paths": paths,
        "components": {**components, "securitySchemes": SECURITY, "schemas": named},
        "security": [{"apiKeyAuth": []}, {}],
        "x-fal-order-paths": list(paths),
    }


_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")


def schemas(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The components of these endpoints and of the queue, by name, with `x-fal-order-properties` in each object."""
    models: list[tuple[type[BaseModel], Any]] = [(answers.QueueStatus, "serialization"), (answers.CancelAnswer, "serialization")]
    for endpoint in endpoints:
        models += [(endpoint.input, "validation"), (endpoint.output, "serialization")]
    _, found = models_json_schema(models, ref_template=REFERENCE + "{model}")
    failure = TypeAdapter(answers.FAILURES).json_schema(ref_template=REFERENCE + "{model}", mode="serialization")
    named: dict[str, Any] = found["$defs"] | failure.pop("$defs") | {"Failure": failure}
    return {name: _ordered(each) for name, each in named.items()}


def endpoint_paths(endpoint: Endpoint, prefix: str, app: str) -> dict[str, Any]:
    """The routes of one endpoint's queue. app: what follows `prefix` in the paths of its requests."""
    name, request = endpoint.input.__name__.removesuffix("Input"), f"{prefix}/{app}/requests/{{request_id}}"
    status, failure = _answer("QueueStatus", "Where the request stands."), _answer("Failure", "A failure.")
    waits = {"202": _answer("QueueStatus", "It is not completed yet.")}
    stream = {"description": "Events until it is completed.", "content": {"text/event-stream": {"schema": EVENT}}}

    def operation(verb: str, summary: str, parameters: list[Any], answered: dict[str, Any], **more: Any) -> dict[str, Any]:
        about = {"operationId": f"{verb}{name}", "summary": summary, "tags": [endpoint.id]}
        return {**about, "parameters": parameters, "responses": {**answered, "default": failure}, **more}

    body = {"required": True, "content": {"application/json": {"schema": {"$ref": REFERENCE + endpoint.input.__name__}}}}
    output = _answer(endpoint.output.__name__, "The output.")
    submit = operation("submit", endpoint.description, [], {"200": status}, requestBody=body)
    cancel = operation("cancel", "Cancel it.", [_REQUEST_ID], {"202": _answer("CancelAnswer", "It is being cancelled.")})
    return {
        f"{prefix}/{endpoint.id}": {"post": submit},
        request: {"get": operation("result", "The output.", [_REQUEST_ID], {"200": output})},
        f"{request}/status": {
            "get": operation("status", "Where it stands.", [_REQUEST_ID, _LOGS], {"200": status, **waits}),
        },
        f"{request}/status/stream": {
            "get": operation("stream", "The same as server-sent events.", [_REQUEST_ID, _LOGS], {"200": stream}),
        },
        f"{request}/cancel": {"put": cancel},
    }


def run_paths(endpoint: Endpoint) -> dict[str, Any]:
    """The routes of one endpoint's direct calls. A WebSocket has no place in OpenAPI: `x-fal-protocol` marks it, as at fal."""
    name, failure = endpoint.input.__name__.removesuffix("Input"), _answer("Failure", "A failure.")
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": REFERENCE + endpoint.input.__name__}}}}
    output = _answer(endpoint.output.__name__, "The output.")
    events = {"description": "Progress, then the output.", "content": {"text/event-stream": {"schema": EVENT}}}

    def operation(verb: str, summary: str, answered: dict[str, Any]) -> dict[str, Any]:
        about = {"operationId": f"{verb}{name}", "summary": summary, "tags": [endpoint.id], "requestBody": body}
        return {"post": {**about, "responses": {"200": answered, "default": failure}}}

    paths: dict[str, Any] = {
        f"/run/{endpoint.id}": operation("run", "Wait for the output.", output),
        f"/run/{endpoint.id}/stream": operation("runStream", "Progress as server-sent events, then the output.", events),
    }
    if endpoint.realtime:
        protocol = {"type": "realtime", "operationId": f"realtime{name}", "contentType": "application/msgpack"}
        item = operation("realtime", "Many requests on one WebSocket.", output)
        paths[f"/run/{endpoint.id}/realtime"] = {**item, "x-fal-protocol": protocol}
    return paths


def _answer(schema: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": REFERENCE + schema}}}}


def _ordered(schema: Any) -> Any:
    """With `x-fal-order-properties` beside the properties of every object in it."""
    if isinstance(schema, list):
        return [_ordered(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _ordered(each) for key, each in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made["x-fal-order-properties"] = list(schema["properties"])
        for name, field in made["properties"].items():
            if kind := next((kind for kind in ("image", "video") if name.endswith(f"{kind}_url")), None):
                field["ui"] = {"field": kind, "important": name in schema.get("required", ())}  # as fal's SDK does
    return made


def _in_3_0(value: Any) -> Any:
    """OpenAPI 3.0 has no type null: such an alternative becomes `nullable`. Nor has it `const`, or more than one example."""
    if isinstance(value, list):
        return [_in_3_0(each) for each in value]
    if not isinstance(value, dict):
        return value
    made = {key: _in_3_0(each) for key, each in value.items()}
    if isinstance(made.get("anyOf"), list) and {"type": "null"} in made["anyOf"]:
        others = [each for each in made.pop("anyOf") if each != {"type": "null"}]
        made |= {"nullable": True, **(others[0] if len(others) == 1 else {"anyOf": others})}
    if "const" in made:
        made["enum"] = [made.pop("const")]
    return made
