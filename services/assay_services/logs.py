"""Logs of a service's processes, to stderr: a line a record for people, or a JSON object a line for machines.

What is logged while a request is answered has the request's id. Bodies and keys are never logged.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
# Of the request that this task or thread answers.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_QUIET = ("httpx", "mlflow", "alembic", "feast")


class _Json(logging.Formatter):
    """For machines; the names are those of OpenTelemetry's log data model where it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        said: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "logger": record.name,
            "process": record.process,
            "body": record.getMessage(),
        }
        if request := REQUEST_ID.get():
            said["request_id"] = request
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def log_to_stderr(form: LogFormat) -> None:
    """As all processes of a service do."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
