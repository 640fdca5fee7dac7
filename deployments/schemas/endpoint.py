"""The endpoints that are served."""

from importlib import import_module

from deployments.schemas.description import Endpoint as Endpoint

_SCHEMAS = (
    "deployments.schemas.animatediff",
    "deployments.schemas.controlnext",
)
"""Modules with an `ENDPOINT`. To add an endpoint: such a module, a line here, a folder and a line in `engines/registry.py`, and a
block in the YAML under the endpoint's family."""

ENDPOINTS: dict[str, Endpoint] = {made.id: made for made in (import_module(name).ENDPOINT for name in _SCHEMAS)}
