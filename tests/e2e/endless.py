"""`deployments.app` whose decoder never ends with one seed's jobs. Named as `import_path` in a YAML."""

from typing import Any

from ray import serve

from deployments import app
from deployments.settings import Settings, TelemetrySettings
from engines.spec import Clip, Latents
from tests.fakes import EndlessStage

ENDLESS_SEED = 666


class EndlessFor:
    """A decoding stage that is `stage` for every other seed."""

    def __init__(self, stage: Any):
        self.stage, self.endless = stage, EndlessStage()

    def decode(self, latents: Latents, **options: Any) -> Clip:
        return (self.endless if latents.seed == ENDLESS_SEED else self.stage).decode(latents, **options)


class EndlessReplica(app.DecodeReplica):
    """The wrapper is the real one."""

    def __init__(self, telemetry: TelemetrySettings, *args: Any):
        super().__init__(telemetry, *args)
        self.wrapper.stage = EndlessFor(self.wrapper.stage)  # type: ignore[assignment]  # `decode` is all that is called


app.DecodeReplica = EndlessReplica  # type: ignore[misc]  # in whichever process imports this file


def build(args: Settings) -> serve.Application:
    """The application."""
    return app.build(args)
