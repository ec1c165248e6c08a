"""Logging to standard error: lines for people, or JSON objects for machines."""

import contextvars
import dataclasses
import datetime
import json
import logging
import sys
from typing import Any


@dataclasses.dataclass
class Current:
    """The request that the running code works for."""

    id: str
    trace_headers: dict[str, str] = dataclasses.field(default_factory=dict)  # which span of the client's it belongs to
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


current: contextvars.ContextVar[Current | None] = contextvars.ContextVar("current", default=None)


def configure(level: str, format: str) -> None:
    """Send all logging of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    wanted = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(wanted, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("jaxserve").setLevel(wanted)


def note(**facts: Any) -> None:
    """Something that the line about the current request should tell."""
    if request := current.get():
        request.facts.update(facts)


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What a record tells beside its message."""
    request = current.get()
    return ({"request_id": request.id} if request else {}) | getattr(record, "facts", {})


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join([super().formatMessage(record), *(f"{k}={_plain(v)}" for k, v in _facts(record).items())])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: Any) -> str:
    """A value that ends where the next one begins, on the same line."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text and '"' not in text else json.dumps(text)
