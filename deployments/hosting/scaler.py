"""The autoscaling that the YAML gives to Serve: the policy of `dispatch/autoscaling.py` with the service's own settings.

Serve makes it in its controller, which needs this package installed. A mistake here must not end the controller's loop, so the
settings are parsed and the database is looked for in the thread that reads the backlog.
"""

from collections.abc import Sequence
from typing import Any

from deployments.dispatch.autoscaling import BacklogPolicy
from deployments.dispatch.backlog import BacklogReader
from deployments.hosting.embedded_postgres import database_url
from deployments.settings import ScaledEndpoint, Settings


class Scaler(BacklogPolicy):
    """settings: the `args` of the application; in the YAML an alias of them."""

    def __init__(self, settings: dict[str, Any]):
        def find() -> tuple[str, Sequence[ScaledEndpoint]]:
            known = Settings.model_validate(settings)
            return database_url(known), known.scaled_endpoints()

        super().__init__(BacklogReader(find))
