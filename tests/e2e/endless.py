"""`deployments.app` with a stage that decodes until it is stopped. Named as `import_path` in a YAML."""

import asyncio
from typing import Any

from ray import serve

from deployments import app
from deployments.decode import Decode
from deployments.settings import Settings
from tests.fakes import EndlessStage


class EndlessDecode(Decode):
    """The wrapper is the real one."""

    def __init__(self, model: str, config: Any):
        self.stage: Any = EndlessStage()
        self.turn = asyncio.Lock()


app.Decode = EndlessDecode  # type: ignore[misc]  # in whichever process imports this file


def build(args: Settings) -> serve.Application:
    """The application."""
    return app.build(args)
