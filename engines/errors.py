"""Every error that a caller can get, in fal's two formats, and those for the operator.

    ReelrayError
    ├── ModelError                  detail is a list of {loc, msg, type}   (fal: model errors)
    │   ├── ImageLoadError              422  image_load_error
    │   ├── UnsupportedImageFormat      422  unsupported_image_format
    │   ├── ImageTooLarge               422  image_too_large
    │   ├── ImageTooSmall               422  image_too_small
    │   ├── VideoLoadError              422  video_load_error
    │   ├── UnsupportedVideoFormat      422  unsupported_video_format
    │   ├── VideoTooLong                422  video_duration_too_long
    │   ├── PersonNotFound              422  pose_detection_error
    │   ├── ValueTooLarge               422  less_than_equal
    │   ├── FileDownloadError           422  file_download_error
    │   ├── FileTooLarge                422  file_too_large
    │   ├── GenerationTimeout           504  generation_timeout
    │   └── GenerationFailed            500  internal_server_error
    ├── RequestError                detail is a string, error_type beside it (fal: request errors)
    │   ├── BadRequest                  400  bad_request
    │   │   └── BodyTooSlow                 400  bad_request
    │   ├── Unauthorized                401  unauthorized
    │   ├── Forbidden                   403  forbidden
    │   ├── NotFound                    404  not_found
    │   ├── LengthRequired              411  bad_request
    │   ├── PreconditionFailed          412  bad_request
    │   ├── BodyTooLarge                413  bad_request
    │   ├── QueueFull                   429  queue_full
    │   ├── TooManyRequests             429  too_many_requests
    │   ├── IdempotencyKeyReused        422  idempotency_key_reused
    │   ├── Cancelled                   499  client_cancelled
    │   ├── InternalError               500  internal_error
    │   ├── RunnerFailed                500  runner_server_error
    │   ├── RunnerOutOfMemory           500  runner_server_error
    │   ├── RunnerDisconnected          503  runner_disconnected
    │   │   └── SamplerLost                 503  runner_disconnected
    │   ├── RunnerStalled               503  runner_connection_timeout
    │   ├── StorageFailed               500  internal_error
    │   ├── StartTimeout                504  request_timeout
    │   └── RunTimeout                  504  request_timeout
    ├── WeightsError                for the operator: a checkpoint that does not fit
    └── EngineError                 for the operator: an engine that cannot be built, loaded or run

Types and codes: fal.ai/docs, model-apis/errors and model-apis/request-errors. Ray pickles these objects, so every
argument goes positionally to `Exception.__init__`: pickle rebuilds an exception from its `args`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class ReelrayError(Exception):
    """Something went wrong.

    message: for the caller, one sentence, no secrets. loc: path to the offending field, e.g. ("body", "seed").
    ctx: machine-readable limits, as fal's `ctx`. The class docstring's first line is the default message.
    """

    type: str = "internal_server_error"
    status: int = 500
    retryable: bool = False

    def __init__(self, message: str = "", loc: tuple[str | int, ...] = (), ctx: Mapping[str, Any] | None = None):
        super().__init__(message, loc, ctx)
        self.message = message or (type(self).__doc__ or "").partition("\n")[0]
        self.loc = loc
        self.ctx = dict(ctx or {})

    def __str__(self) -> str:
        return self.message


class ModelError(ReelrayError):
    """The model could not serve this input."""


class ImageLoadError(ModelError):
    """The image could not be decoded."""

    type = "image_load_error"
    status = 422


class UnsupportedImageFormat(ModelError):
    """The image is in a format that is not served."""

    type = "unsupported_image_format"
    status = 422


class ImageTooLarge(ModelError):
    """The image has too many pixels."""

    type = "image_too_large"
    status = 422


class ImageTooSmall(ModelError):
    """The image has too few pixels."""

    type = "image_too_small"
    status = 422


class VideoLoadError(ModelError):
    """The video could not be decoded."""

    type = "video_load_error"
    status = 422


class UnsupportedVideoFormat(ModelError):
    """The file is not a video in a format that is served."""

    type = "unsupported_video_format"
    status = 422


class VideoTooLong(ModelError):
    """The video is longer than allowed."""

    type = "video_duration_too_long"
    status = 422


class PersonNotFound(ModelError):
    """No person was found."""

    type = "pose_detection_error"
    status = 422


class ValueTooLarge(ModelError):
    """The value is larger than this service can serve."""

    type = "less_than_equal"
    status = 422


class FileDownloadError(ModelError):
    """The file could not be downloaded."""

    type = "file_download_error"
    status = 422


class FileTooLarge(ModelError):
    """The file is larger than allowed."""

    type = "file_too_large"
    status = 422


class GenerationTimeout(ModelError):
    """The generation took longer than this service allows."""

    type = "generation_timeout"
    status = 504


class GenerationFailed(ModelError):
    """The model produced values that are not numbers."""


class RequestError(ReelrayError):
    """The request could not be served."""

    type = "internal_error"


class BadRequest(RequestError):
    """The request is malformed."""

    type = "bad_request"
    status = 400


class BodyTooSlow(BadRequest):
    """The request body came too slowly."""


class Unauthorized(RequestError):
    """The API key is missing or not valid."""

    type = "unauthorized"
    status = 401


class Forbidden(RequestError):
    """The API key does not allow this."""

    # neither of fal's clients repeats a 403
    type = "forbidden"
    status = 403


class NotFound(RequestError):
    """There is nothing here."""

    type = "not_found"
    status = 404


class LengthRequired(RequestError):
    """The request does not say how long its body is."""

    type = "bad_request"
    status = 411


class PreconditionFailed(RequestError):
    """The file is not the one that the request is for."""

    type = "bad_request"
    status = 412


class BodyTooLarge(RequestError):
    """The request body is larger than allowed."""

    type = "bad_request"
    status = 413


class QueueFull(RequestError):
    """More requests than the caller allowed are already waiting."""

    type = "queue_full"
    status = 429


class TooManyRequests(RequestError):
    """The caller has as much here as it may have at once."""

    # both of fal's clients repeat a 429, and nothing has been queued
    type = "too_many_requests"
    status = 429


class IdempotencyKeyReused(RequestError):
    """The idempotency key was used for another request already."""

    # 422 as in the IETF's draft-ietf-httpapi-idempotency-key-header; neither of fal's clients repeats it
    type = "idempotency_key_reused"
    status = 422


class Cancelled(RequestError):
    """The request was cancelled."""

    type = "client_cancelled"
    status = 499


class InternalError(RequestError):
    """The service failed."""

    type = "internal_error"


class RunnerFailed(RequestError):
    """The runner failed on this request."""

    type = "runner_server_error"


class RunnerOutOfMemory(RequestError):
    """The runner had not enough memory for this request."""

    type = "runner_server_error"
    retryable = True


class RunnerDisconnected(RequestError):
    """The runner died or could not be reached while it worked on this request."""

    type = "runner_disconnected"
    status = 503
    retryable = True


class SamplerLost(RunnerDisconnected):
    """The process that drove this request's steps, and those of others, died or could not be reached."""


class RunnerStalled(RequestError):
    """The runner made no progress on this request for too long."""

    type = "runner_connection_timeout"
    status = 503
    retryable = True


class StorageFailed(RequestError):
    """A file could not be stored."""

    type = "internal_error"
    retryable = True


class StartTimeout(RequestError):
    """The request did not start before its deadline."""

    type = "request_timeout"
    status = 504


class RunTimeout(RequestError):
    """The request takes longer than a direct call may."""

    type = "request_timeout"
    status = 504


class WeightsError(ReelrayError):
    """A checkpoint does not fit the model."""


class EngineError(ReelrayError):
    """An engine cannot be built, loaded or run."""


@contextmanager
def blamed_on(field: str) -> Iterator[None]:
    """Gives a `ModelError` raised in this context the loc ("body", field) if it has none: media code does not know fields."""
    try:
        yield
    except ModelError as exc:
        raise type(exc)(exc.message, exc.loc or ("body", field), exc.ctx) from exc
