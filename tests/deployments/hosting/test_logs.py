"""Log records as an operator's tools read them."""

import json
import logging
from typing import Any

import pytest

from deployments import tracing
from deployments.hosting.logs import TraceFields, formatter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HOSTILE = 'refused\n23:00 ERROR all is lost "\x00\x1b[31m\ud800'


def record_of(raised: BaseException | None = None, **fields: Any) -> logging.LogRecord:
    """A record that was made within a trace."""
    exc_info = None if raised is None else (type(raised), raised, raised.__traceback__)
    record = logging.LogRecord("deployments.x", logging.WARNING, "x.py", 1, "attempt %s", ("failed",), exc_info)
    vars(record).update(fields)
    with tracing.span("attempt", f"00-{TRACE}-{PARENT}-01"):
        TraceFields().filter(record)
    return record


def test_a_json_record_is_one_line_with_every_field_whatever_is_in_it() -> None:
    try:
        raise ValueError("broken")
    except ValueError as exc:
        line = formatter("json").format(record_of(exc, action="attempt_failed", attempt=2, error=HOSTILE, other={1, 2}))
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("time")
    assert fields.pop("other") == "{1, 2}"
    assert "ValueError: broken" in fields.pop("traceback")
    assert fields == {
        "level": "WARNING",
        "logger": "deployments.x",
        "event": "attempt failed",
        "action": "attempt_failed",
        "attempt": 2,
        "error": HOSTILE,
        "trace_id": TRACE,
        "span_id": PARENT,
    }


def test_a_text_record_ends_with_its_fields() -> None:
    line = formatter("text").format(record_of(action="attempt_failed", attempt=2))
    assert line.endswith(
        f" WARNING deployments.x attempt failed action=attempt_failed attempt=2 trace_id={TRACE} span_id={PARENT}"
    )


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_record_outside_of_a_trace_names_none(style: Any) -> None:
    record = logging.LogRecord("deployments.x", logging.INFO, "x.py", 1, "started", (), None)
    assert TraceFields().filter(record)
    assert "trace_id" not in formatter(style).format(record)
