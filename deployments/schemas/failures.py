"""How a failure looks to its caller: pydantic's findings and our own errors in fal's two shapes.

Facts: `fal-queue-protocol.md` section 6. Field errors carry pydantic's own types where pydantic has one, fal's otherwise; both
clients pass them through.
"""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engines.errors import ModelError, ReelrayError, RunTimeout, StartTimeout

MAX_ECHO_CHARS = 200
"""A wrong value is shown in its error up to this length: a data URI of megabytes helps nobody."""
MAX_FAULTS = 20
"""More are not told: a failure is stored, and every poll answers it."""
MAX_NAME_CHARS = 60


@dataclass(frozen=True)
class Failure:
    """How a job ended without a result: exactly what the result request will answer.

    status: HTTP status. body: fal's error JSON. error, error_type: the text and type shown in the job's status.
    """

    status: int
    body: dict[str, Any]
    error: str
    error_type: str
    headers: dict[str, str]


def validation_failure(exc: ValidationError) -> Failure:
    """Pydantic's findings in fal's shape: 422, one entry a fault, `MAX_FAULTS` at most, loc beginning with "body"."""
    details = []
    for fault in exc.errors(include_url=False, include_context=True)[:MAX_FAULTS]:
        detail: dict[str, Any] = {
            "loc": ["body", *(shortened(part) if isinstance(part, str) else part for part in fault["loc"])],
            "msg": fault["msg"],
            "type": fault["type"],
            "url": f"https://docs.fal.ai/errors#{fault['type']}",
        }
        if ctx := fault.get("ctx"):
            detail["ctx"] = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in ctx.items()}
        if isinstance(fault["input"], (int, float, str)) and len(str(fault["input"])) <= MAX_ECHO_CHARS:
            is_json = not isinstance(fault["input"], float) or math.isfinite(fault["input"])  # NaN and Infinity are not
            detail["input"] = fault["input"] if is_json else str(fault["input"])
        details.append(detail)
    text = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details)
    return Failure(422, {"detail": details}, text, details[0]["type"], {"X-Fal-Needs-Retry": "0"})


def shortened(name: str) -> str:
    """The name of a field as an answer shows it: a caller may have made it up."""
    return name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 1] + "…"


def error_failure(exc: ReelrayError) -> Failure:
    """One of our errors in fal's shape: a list with a loc for the model's, a string with an error_type for the queue's."""
    if isinstance(exc, ModelError):
        detail: dict[str, Any] = {
            "loc": list(exc.loc or ("body",)),
            "msg": exc.message,
            "type": exc.type,
            "url": f"https://docs.fal.ai/errors#{exc.type}",
        }
        if exc.ctx:
            detail["ctx"] = exc.ctx
        headers = {"X-Fal-Needs-Retry": str(int(exc.retryable))}
        return Failure(exc.status, {"detail": [detail]}, exc.message, exc.type, headers)
    headers = {"X-Fal-Error-Type": exc.type}
    if isinstance(exc, StartTimeout | RunTimeout):
        headers["X-Fal-Request-Timeout-Type"] = "user"  # tells both clients not to retry
    return Failure(exc.status, {"detail": exc.message, "error_type": exc.type}, exc.message, exc.type, headers)


def request_failure(status: int, error_type: str, detail: str) -> Failure:
    """A failure of the queue's own: a string with an error_type."""
    return Failure(status, {"detail": detail, "error_type": error_type}, detail, error_type, {"X-Fal-Error-Type": error_type})
