"""The format of log records: the event, then its fields as key=value, so that a job can be followed through every process."""

import logging
import sys

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class FieldFormatter(logging.Formatter):
    """Appends the fields that were given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """E.g. "23:31:07,120 WARNING deployments.dispatch.dispatcher attempt failed action=attempt_failed attempt=1"."""
        line, *traceback = super().format(record).split("\n")
        fields = (f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD)
        return "\n".join([" ".join([line, *fields]), *traceback])


def configure_logging() -> None:
    """Sends our log records to stderr, which Ray writes to a file for each replica. Call it once per process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
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
