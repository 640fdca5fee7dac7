"""What an operator can set: the `args` of `serve_config.yaml`, and the only place that reads the environment.

Unknown keys are refused at every level, so a misspelt option never passes for its default.
"""

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from fsspec.utils import get_protocol
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from deployments.schemas.endpoint import ENDPOINTS, Endpoint
from engines.config import ModelConfig
from engines.errors import ReelrayError

CONFIG_VARIABLE = "REELRAY_CONFIG"
"""Environment variable with the path of the YAML, for processes that are not started by our command line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FetchSettings(_Strict):
    """Limits on downloads from callers' URLs. allow_private: also from private addresses, which are in the operator's network."""

    allow_private: bool = False
    max_bytes: int = Field(100_000_000, gt=0)
    timeout_s: float = Field(60.0, gt=0)
    max_redirects: int = Field(5, ge=0)


class Deadlines(_Strict):
    """For one attempt at a job, in seconds.

    run_s: from its claim on, including the wait for its stages' turns; then the job fails as `generation_timeout`.
    idle_s: how long a stage whose turn has come may note no progress; then the attempt is stopped, and counts as one.
    """

    run_s: float = Field(7200.0, gt=0)
    idle_s: float = Field(600.0, gt=0)


class QueueSettings(_Strict):
    """Leases, retries and how many jobs of an endpoint are worked on at once.

    lease_s: how long a claimed job belongs to its worker after the last heartbeat, in seconds. A job of a killed service starts
    again after this time.
    max_attempts: how often a job is tried before its last error ends it; `jobs/retry.py` says which errors are tried again, and
    when.
    max_in_flight: the most jobs of an endpoint in its three stages at once; None: as many as keep the replicas that there are
    busy, and hide the time of the other stages.
    idempotency_s: how long submissions with the same `Idempotency-Key` get the job of the first one, in seconds, if that job is
    kept so long.
    deadlines: endpoint's id -> its deadlines, where the defaults do not fit.
    checkpoint_s: the least time between two checkpoints of a job, in seconds of denoising. About as much work is lost when a
    replica is killed; one that is shut down stores its last step first, and finished latents are always stored.
    low_after_s: jobs of low priority wait behind all others. Once the oldest of them has waited this long, in seconds, every
    fourth job that its endpoint starts is one of them.
    """

    lease_s: float = Field(10.0, gt=0)
    max_attempts: int = Field(10, ge=1)
    max_in_flight: int | None = Field(None, ge=1)
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

    jobs_s: a job after its end, with its logs. files_s: an output file, unless its caller's `X-Fal-Object-Lifecycle-Preference`
    says otherwise. max_files_s: the longest that a caller may ask for.
    """

    jobs_s: float | None = Field(30 * 86_400.0, gt=0)
    files_s: float | None = Field(7 * 86_400.0, gt=0)
    max_files_s: float = Field(366 * 86_400.0, gt=0)

    def keep_file_s(self, wish_s: float | None) -> float | None:
        """How long a file is kept if its caller asks for `wish_s`; None: the caller asks for nothing."""
        return self.files_s if wish_s is None else min(wish_s, self.max_files_s)


class QuotaSettings(_Strict):
    """What one API key may have at once; None is any number. Where `auth` is open there are no keys, and no quotas.

    waiting_jobs: queued at all endpoints together. stored_bytes: of uploads, and of files that were sent as data URIs with jobs
    which have not ended. open_streams: streams, direct calls and WebSockets of one ingress process. open_uploads: bodies that it
    receives at a time.
    """

    waiting_jobs: int | None = Field(10_000, gt=0)
    stored_bytes: int | None = Field(20_000_000_000, gt=0)
    open_streams: int | None = Field(200, gt=0)
    open_uploads: int | None = Field(200, gt=0)


class UploadSettings(_Strict):
    """Files that callers upload.

    max_bytes: of one file. `fetch.max_bytes` says how large one may be that a job uses.
    open_s: for how long an upload URL is good, and how long its body may take, in seconds. What is not complete after twice this
    is deleted.
    direct: lets callers of `storage/upload/initiate` send a file to the bucket itself, by a URL that it has signed, where `files`
    is an S3-compatible one. The bucket must be within their reach, and allow web pages of other origins if those are to upload.
    Such a URL is good for an hour at most. What arrives is taken in at the first read or within a minute, and does not change
    from then on; what is larger than its upload reserved (100 MB, or the `file_size` asked for) is deleted.
    """

    max_bytes: int = Field(5_000_000_000, gt=0)
    open_s: float = Field(43_200.0, gt=0, le=7 * 86_400.0)
    direct: bool = False


class WebhookSettings(_Strict):
    """How webhooks are delivered. Callers choose the receivers, so `fetch.allow_private` applies to them as well.

    timeout_s: from looking up the receiver's name to the end of its answer's headers.
    max_in_flight: concurrent deliveries of one courier; every dispatcher has one.
    max_per_receiver: concurrent deliveries to one host and port for one API key, of all couriers together: a slow or dead
    receiver occupies no more than these.
    max_per_owner: concurrent deliveries for one API key, of all couriers together: many slow receivers of one key leave the rest
    of `max_in_flight` to the others.
    """

    timeout_s: float = Field(15.0, gt=0, le=30)
    max_in_flight: int = Field(128, ge=1)
    max_per_receiver: int = Field(4, ge=1)
    max_per_owner: int = Field(64, ge=1)


class TelemetrySettings(_Strict):
    """logs: "text", or "json" for one object a line. otlp_endpoint: where spans are sent by OTLP over HTTP, e.g.
    http://collector:4318/v1/traces; None makes none. traces: the share of the traces whose spans are sent, in [0, 1]."""

    logs: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://")
    traces: float = Field(1.0, ge=0, le=1)


class StageScaling(_Strict):
    """min, max: replicas of a stage. With a `min` of 0 it costs nothing without work, but its next job waits for a start."""

    min: int = Field(1, ge=0)
    max: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max, {self.max}")
        return self


class EndpointScaling(_Strict):
    """How an endpoint's stages are scaled: for what waits, in seconds of work (see `dispatch/autoscaling.py`).

    drain_s: in how many seconds what waits should be worked off, once replicas for it are ready. idle_s: for how many seconds
    fewer replicas must have been enough before there are fewer; below 300, a rise may be taken back within five minutes.
    """

    drain_s: float = Field(30.0, gt=0)
    idle_s: float = Field(300.0, ge=0)
    preprocess: StageScaling = StageScaling()
    denoise: StageScaling = StageScaling()
    decode: StageScaling = StageScaling()


@dataclass(frozen=True)
class ScaledEndpoint:
    """What the autoscaling needs to know of an endpoint; see `dispatch/backlog.py`."""

    id: str
    family: str
    unit_times: tuple[float, float, float]
    drain_s: float
    idle_s: float


if TYPE_CHECKING:

    class _Endpoints(_Strict):
        pass

    class ScalingSettings(_Strict):
        """Family -> its scaling."""

else:  # a field for each endpoint, named after its family
    _configs = {endpoint.family: (endpoint.config | None, endpoint.config()) for endpoint in ENDPOINTS.values()}
    _Endpoints = create_model("_Endpoints", __base__=_Strict, **_configs)
    _scalings = {endpoint.family: (EndpointScaling, EndpointScaling()) for endpoint in ENDPOINTS.values()}
    ScalingSettings = create_model("ScalingSettings", __base__=_Strict, **_scalings)


class Settings(_Endpoints):
    """The service.

    home: folder for everything the embedded defaults keep (database, files, demo weights).
    database: a postgresql:// URL, or "embedded": PostgreSQL from its wheel, under `home`.
    files: an fsspec URL for outputs and checkpoints, which every node must be able to write to; None keeps them under `home`.
    files_shared: `files` is a folder on a file system that every node mounts. On a cluster of several nodes a folder is refused
    otherwise, and so is the embedded database: each node would have its own.
    public_url: the scheme and host that callers use, if it is not the one in their Host header. The URLs in answers begin with
    it; those in a webhook begin with the address that its job was submitted to.
    auth: "open" serves everybody who can connect, so it is refused if the service listens on more than loopback; "keys" requires
    an API key made by `reelray keys create`.
    open_to_network: lets an open service listen on the network. Web pages may submit to an open service if they come from this
    machine or from `public_url`; with this setting, also if they come from the host that they call. It then answers to any host
    name, so that pages of any site reach it through the browsers of this network (DNS rebinding), unless `public_url` names it.
    allowed_origins: web pages of these origins may call, e.g. https://studio.example. Pages from this machine may always call an
    open service. With keys, None lets all pages call: there are no cookies, so a page has only the key or token it was given.
    unknown_fields: "ignore" fields that an endpoint does not have, and name them in the job's log, as generic tools send the same
    ones everywhere; or "refuse" them.
    run_timeout_s: a direct call that takes longer is answered 504, while its job goes on. Behind Node, fal's JavaScript client
    gives up after 300 s without an answer and submits again.
    max_body_bytes: the largest submission, data URIs included.
    max_bodies_bytes: of all submissions that one ingress process receives at a time; more of them wait.
    scaling: the least and the most replicas of each stage, and how soon there are more or fewer; by the endpoint's family.
    animatediff, controlnext, and so on: the config of each endpoint, by its family; null leaves the endpoint out.
    """

    home: Path = Field(default_factory=lambda: Path(os.environ.get("REELRAY_HOME", "~/.reelray")).expanduser().absolute())
    database: str = "embedded"
    files: str | None = None
    files_shared: bool = False
    public_url: str | None = None
    auth: Literal["open", "keys"] = "open"
    open_to_network: bool = False
    allowed_origins: tuple[str, ...] | None = None
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    run_timeout_s: float = Field(285.0, gt=0)
    max_body_bytes: int = Field(64_000_000, gt=0)
    max_bodies_bytes: int = Field(256_000_000, gt=0)
    fetch: FetchSettings = FetchSettings()
    queue: QueueSettings = QueueSettings()
    retention: RetentionSettings = RetentionSettings()
    quotas: QuotaSettings = QuotaSettings()
    uploads: UploadSettings = UploadSettings()
    webhooks: WebhookSettings = WebhookSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    scaling: ScalingSettings = ScalingSettings()

    @model_validator(mode="after")
    def _direct_uploads_need_a_bucket(self) -> Self:
        if self.uploads.direct and get_protocol(self.files_url) not in ("s3", "s3a"):
            raise ValueError("uploads.direct needs `files` to be an s3:// URL")
        return self

    @property
    def files_url(self) -> str:
        """The fsspec URL of the file store."""
        return self.files or str(self.home / "files")

    @property
    def demo_weights(self) -> Path:
        """The folder of the demo checkpoints, one folder a model in it."""
        return self.home / "weights" / "demo"

    def refuse_exposure(self, host: str | None) -> None:
        """Raises `Exposed` if everybody on the network could use a service that listens on `host`. None: it does not listen."""
        if self.auth == "open" and not self.open_to_network and not (host is None or is_loopback(host)):
            raise Exposed(
                f"auth: open serves everybody who can connect, and {host or 'an empty host'} is more than loopback. Set"
                " auth: keys and create keys with `reelray keys create`, or set open_to_network: true if that is intended."
            )

    def refuse_split(self, nodes: int) -> None:
        """Raises `Split` if the replicas of a service on so many nodes would not all see the same jobs and files."""
        if nodes > 1 and self.database == "embedded":
            raise Split(f"This Ray cluster has {nodes} nodes, and each would start its own database: set `database` to a URL.")
        if nodes > 1 and not self.files_shared and get_protocol(self.files_url) in ("file", "local", "memory"):
            raise Split(
                f"This Ray cluster has {nodes} nodes, and each would keep its own files in {self.files_url}: set `files` to an"
                " object store's URL, or files_shared: true if it is a folder that every node mounts."
            )

    def model_configs(self) -> dict[str, ModelConfig]:
        """Model name -> its config, with "demo" and what lies below `home` turned into folders. Models left out are absent."""
        return {
            endpoint.model: config.placed(self.demo_weights / endpoint.family, self.home / "engines")
            for endpoint in ENDPOINTS.values()
            if (config := self.config_of(endpoint)) is not None
        }

    def scaling_of(self, endpoint: Endpoint) -> EndpointScaling:
        """How its stages are scaled."""
        scaling: EndpointScaling = getattr(self.scaling, endpoint.family)
        return scaling

    def scaled_endpoints(self) -> tuple[ScaledEndpoint, ...]:
        """The endpoints that are served, for the autoscaling."""
        return tuple(
            ScaledEndpoint(each.id, each.family, each.unit_times, scaling.drain_s, scaling.idle_s)
            for each in ENDPOINTS.values()
            if self.config_of(each) is not None
            for scaling in [self.scaling_of(each)]
        )

    def wants_demo_weights(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint is served, with its demo checkpoint."""
        return getattr(self.config_of(endpoint), "weights", None) == "demo"

    def config_of(self, endpoint: Endpoint) -> ModelConfig | None:
        """Its model's config as it stands in the YAML; None: it is left out."""
        config: ModelConfig | None = getattr(self, endpoint.family)
        return config


class Exposed(ReelrayError):
    """An open service would listen on the network."""


class Split(ReelrayError):
    """The nodes of a cluster would not share their jobs or files."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`. Of all names, only localhost counts."""
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
