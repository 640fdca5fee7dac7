"""What an operator can set: the `args` of `serve_config.yaml`, and the only place that reads the environment.

Unknown keys are refused at every level, so a misspelt option never passes for its default.
"""

import os
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from deployments.schemas import ENDPOINTS
from engines.animatediff.config import AnimateDiffConfig, AnimateDiffWeights
from engines.backends.config import EngineConfig
from engines.controlnext.config import ControlNeXtConfig, ControlNeXtWeights
from engines.errors import ReelrayError

CONFIG_VARIABLE = "REELRAY_CONFIG"
"""Environment variable with the path of the YAML, for processes that are started without a command line of ours."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FetchSettings(_Strict):
    """Limits on what a caller's URL may cost. Private addresses are refused unless allowed: they are the operator's network."""

    allow_private: bool = False
    max_bytes: int = Field(100_000_000, gt=0)
    timeout_s: float = Field(60.0, gt=0)
    max_redirects: int = Field(5, ge=0)


class Deadlines(_Strict):
    """For one attempt at a job, in seconds.

    run_s: from its claim on, waiting for its stages' turns included; past it the job fails as `generation_timeout`.
    idle_s: without progress noted by a stage whose turn has come; past it the attempt is stopped and counted.
    """

    run_s: float = Field(7200.0, gt=0)
    idle_s: float = Field(600.0, gt=0)


class QueueSettings(_Strict):
    """Leases, retries and how many jobs of an endpoint are worked on at once.

    lease_s: how long a claimed job stays its worker's after the last heartbeat, in seconds: the delay before a job
    of a killed service starts again. max_attempts: claims of one job before its last error is its
    end; which errors are tried again, and when, is said in `jobs/retry.py`.
    max_in_flight: jobs of an endpoint in its three stages at once; two keep the denoiser busy while another is prepared or
    decoded. idempotency_s: how long an `Idempotency-Key` stands for the job that it was first given with, in seconds, if that
    job is kept so long.
    deadlines: by endpoint's id, where the defaults do not do.
    checkpoint_s: seconds of denoising between two checkpoints of a job, at least: so much work may be lost with a replica that is
    killed. One that is shut down keeps the last step, and finished latents are always kept.
    low_after_s: a job of low priority goes behind all others; once the first of these has waited so long, in seconds, every
    fourth job that an endpoint starts is one of them.
    """

    lease_s: float = Field(10.0, gt=0)
    max_attempts: int = Field(10, ge=1)
    max_in_flight: int = Field(3, ge=1)
    idempotency_s: float = Field(86_400.0, gt=0)
    checkpoint_s: float = Field(10.0, gt=0)
    low_after_s: float = Field(600.0, ge=0)
    deadlines: dict[str, Deadlines] = {}

    @field_validator("deadlines")
    @classmethod
    def _of_known_endpoints(cls, deadlines: dict[str, Deadlines]) -> dict[str, Deadlines]:
        if unknown := deadlines.keys() - ENDPOINTS.keys():
            raise ValueError(f"there are no endpoints {', '.join(sorted(unknown))}")
        return deadlines

    def deadlines_of(self, endpoint: str) -> Deadlines:
        """An endpoint's own, or the defaults."""
        return self.deadlines.get(endpoint, Deadlines())


class RetentionSettings(_Strict):
    """How long things are kept, in seconds; None is for ever.

    jobs_s: a job after its end, with its logs. files_s: an output file, where its caller's
    `X-Fal-Object-Lifecycle-Preference` does not say otherwise; max_files_s: the most that one may say.
    """

    jobs_s: float | None = Field(30 * 86_400.0, gt=0)
    files_s: float | None = Field(7 * 86_400.0, gt=0)
    max_files_s: float = Field(366 * 86_400.0, gt=0)

    def keep_file_s(self, wish_s: float | None) -> float | None:
        """How long a file is kept whose caller wished for `wish_s`."""
        return self.files_s if wish_s is None else min(wish_s, self.max_files_s)


class WebhookSettings(_Strict):
    """How webhooks are delivered. Where to is a caller's word, so `fetch.allow_private` holds for it as well.

    timeout_s: from looking up the receiver's name to the head of its answer. max_in_flight: deliveries at once of one courier, of
    which there is one in each dispatcher. max_per_receiver: at once to one host and port, of all couriers: a receiver that is
    slow or dead holds so many and no more.
    """

    timeout_s: float = Field(15.0, gt=0, le=30)
    max_in_flight: int = Field(128, ge=1)
    max_per_receiver: int = Field(4, ge=1)


class Settings(_Strict):
    """The service.

    home: folder for everything the embedded defaults keep (database, files, demo weights).
    database: a postgresql:// URL, or "embedded": PostgreSQL from its wheel, under `home`.
    files: an fsspec URL for outputs and checkpoints, which every node must be able to write to; None keeps them under `home`.
    public_url: scheme and host that callers use, where the Host header does not tell. A webhook names its files by the address
    that its job was submitted to.
    auth: "open" serves everybody who can connect, so it is refused where the service listens on more than loopback; "keys" asks
    for an API key made by `reelray keys create`.
    open_to_network: an open service may listen on the network. Without it, web pages may submit to an open service only if they
    come from this machine or from `public_url`; with it, also from the very host that they call.
    max_body_bytes: of a submission, data URIs included.
    animatediff, controlnext: the endpoints fal-ai/animatediff-sparsectrl-lcm and fal-ai/controlnext; null leaves one out.
    """

    home: Path = Field(default_factory=lambda: Path(os.environ.get("REELRAY_HOME", "~/.reelray")).expanduser().absolute())
    database: str = "embedded"
    files: str | None = None
    public_url: str | None = None
    auth: Literal["open", "keys"] = "open"
    open_to_network: bool = False
    max_body_bytes: int = Field(64_000_000, gt=0)
    fetch: FetchSettings = FetchSettings()
    queue: QueueSettings = QueueSettings()
    retention: RetentionSettings = RetentionSettings()
    webhooks: WebhookSettings = WebhookSettings()
    animatediff: AnimateDiffConfig | None = AnimateDiffConfig()
    controlnext: ControlNeXtConfig | None = ControlNeXtConfig()

    @property
    def files_url(self) -> str:
        """The fsspec URL of the file store."""
        return self.files or str(self.home / "files")

    @property
    def demo_weights(self) -> Path:
        """The folder of the demo checkpoints, one folder a model in it."""
        return self.home / "weights" / "demo"

    def refuse_exposure(self, host: str | None) -> None:
        """Raises `Exposed` if everybody in the network could use the service that listens on `host`. None: it listens nowhere."""
        if self.auth == "open" and not self.open_to_network and not (host is None or is_loopback(host)):
            raise Exposed(
                f"auth: open serves everybody who can connect, and {host or 'an empty host'} is more than loopback. Set"
                " auth: keys and make some with `reelray keys create`, or open_to_network: true if that is meant."
            )

    def model_configs(self) -> dict[str, AnimateDiffConfig | ControlNeXtConfig]:
        """Model name -> its config, with "demo" and what lies below `home` turned into folders. Models left out are absent."""
        configs: dict[str, AnimateDiffConfig | ControlNeXtConfig] = {}
        if (animatediff := self.animatediff) is not None:
            if animatediff.weights == "demo":
                animatediff = replace(animatediff, weights=AnimateDiffWeights.demo(self.demo_weights / "animatediff"))
            configs["animatediff-sparsectrl-lcm"] = replace(animatediff, engine=self._placed(animatediff.engine))
        if (controlnext := self.controlnext) is not None:
            if controlnext.weights == "demo":
                controlnext = replace(controlnext, weights=ControlNeXtWeights.demo(self.demo_weights / "controlnext"))
            configs["controlnext"] = replace(controlnext, engine=self._placed(controlnext.engine))
        return configs

    def _placed(self, engine: EngineConfig) -> EngineConfig:
        return engine if engine.folder is not None else replace(engine, folder=self.home / "engines")


class Exposed(ReelrayError):
    """An open service would listen on the network."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to who listens on `host`. Of names only localhost is known to be."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load_settings(config: Path) -> Settings:
    """The settings in a `serve_config.yaml`: the `args` of its first application."""
    document: dict[str, Any] = yaml.safe_load(config.read_text())
    return Settings.model_validate(document["applications"][0].get("args") or {})


def configured_settings() -> Settings:
    """The settings in the YAML that the environment names."""
    return load_settings(Path(os.environ[CONFIG_VARIABLE]))
