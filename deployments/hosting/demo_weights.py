"""What a fresh machine needs to try the service without downloads: demo checkpoints, and inputs that contain their files."""

import base64
import json
from pathlib import Path
from typing import Any

from deployments.schemas.endpoint import ENDPOINTS
from deployments.settings import Settings
from engines import registry


def write_missing_weights(settings: Settings) -> None:
    """Writes the demo checkpoints that the settings ask for, unless they are there."""
    for endpoint in ENDPOINTS.values():
        folder = settings.demo_weights / endpoint.family
        if settings.wants_demo_weights(endpoint) and not folder.is_dir():
            registry.write_demo_weights(endpoint.model, folder)


def write_demo(folder: Path) -> None:
    """Every model's demo checkpoint below `folder`, and each endpoint's demo input as `<model>.json` with its media beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for endpoint in ENDPOINTS.values():
        registry.write_demo_weights(endpoint.model, folder / endpoint.family)
        if job_input := registry.demo_input(endpoint.model):
            beside = {field: _written(folder, endpoint.model, field, value) for field, value in job_input.items()}
            (folder / f"{endpoint.model}.json").write_text(json.dumps(beside, indent=2) + "\n")


def demo_inputs() -> dict[str, dict[str, Any]]:
    """Endpoint id -> input, for the endpoints that have one."""
    found = {endpoint.id: registry.demo_input(endpoint.model) for endpoint in ENDPOINTS.values()}
    return {
        endpoint_id: {field: _inline(value) for field, value in job_input.items()}
        for endpoint_id, job_input in found.items()
        if job_input is not None
    }


def _written(folder: Path, model: str, field: str, value: Any) -> Any:
    """The name of the file that a file is written to, for `reelray submit` and `render`; any other value as it is."""
    if not isinstance(value, tuple):
        return value
    content_type, data = value
    name = f"{model}-{field.removesuffix('_url')}.{content_type.partition('/')[2]}"
    (folder / name).write_bytes(data)
    return name


def _inline(value: Any) -> Any:
    """A file as a data URI, and any other value as it is."""
    if not isinstance(value, tuple):
        return value
    content_type, data = value
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"
