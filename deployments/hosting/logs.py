"""The format of log records: the event, then its fields, so that a job can be followed through every process.

As text, key=value after the event; as JSON, one object a line. Both name the trace that the record belongs to.
"""

import logging
import sys
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from deployments import tracing

LogFormat = Literal["text", "json"]

JSON_NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "message": "event", "exc_info": "traceback"}
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the fields that were given as `extra`, and the trace's id."""

    def format(self, record: logging.LogRecord) -> str:
        """E.g. "23:31:07,120 WARNING deployments.dispatch.dispatcher attempt failed action=attempt_failed attempt=1"."""
        line, *traceback = super().format(record).split("\n")
        fields = [f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD]
        return "\n".join([" ".join([line, *fields]), *traceback])


class TraceFields(logging.Filter):
    """Adds the ids of the current span to each record, where the record is made: a handler may run elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        vars(record).update(tracing.fields())
        return True


def formatter(style: LogFormat) -> logging.Formatter:
    """What writes our records in that style."""
    if style == "text":
        return FieldFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    return JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=JSON_NAMES, json_default=str)


def configure_logging(style: LogFormat = "text") -> None:
    """Sends our log records to stderr, which Ray writes to a file for each replica. Call it once per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(style))
    handler.addFilter(TraceFields())
    hide_queries()
    for name in ("deployments", "engines"):
        ours = logging.getLogger(name)
        ours.handlers = [handler]
        ours.setLevel(logging.INFO)
        ours.propagate = False


def hide_queries() -> None:
    """Has uvicorn log no WebSocket that opens: its line shows the query, in which fal's clients send their tokens."""
    logging.getLogger("uvicorn.error").addFilter(_is_no_handshake)


def _is_no_handshake(record: logging.LogRecord) -> bool:
    return '"WebSocket %s"' not in str(record.msg)
