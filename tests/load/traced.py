"""`deployments.app` with the dispatcher of `timed.py`.

Used as `import_path` in a YAML. A replica that unpickles `TracedReplica` imports this file, and so is traced too.
"""

from ray import serve

from deployments import app
from deployments.settings import Settings
from tests.load.timed import TracedDispatcher


class TracedReplica(app.DispatcherReplica):
    """Runs a traced dispatcher."""


# in every process that imports this file
app.Dispatcher = TracedDispatcher  # type: ignore[attr-defined, assignment]
app.DispatcherReplica = TracedReplica  # type: ignore[misc]


def build(args: Settings) -> serve.Application:
    """The application, traced."""
    return app.build(args)
