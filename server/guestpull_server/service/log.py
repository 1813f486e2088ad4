"""One line an event, for people or as JSON; to standard error, where a supervisor collects it.

    2026-01-31T12:00:00.123Z warning pull failed request=9f2c61d0 image=busybox reason=IMAGE_NOT_FOUND
    {"time":"2026-01-31T12:00:00.123Z","level":"warning","event":"pull failed","request":"9f2c61d0",...}

An event carries fields: `log.info("pulled", extra=log_fields(image=…, bytes=…))`. The daemon's start
and end are always told; all else is quiet unless something went wrong, or the level says otherwise.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Final

LIFE: Final = logging.getLogger("guestpull_server.life")
"""Where the daemon tells that it starts, and how it ends."""

FieldValue = str | int | float | bool

_MAX_VALUE_CHARACTERS: Final = 4096  # the longest path


class LogFormat(Enum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(Enum):
    """From which level on events are told."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def log_fields(**fields: FieldValue) -> Mapping[str, Mapping[str, FieldValue]]:
    """Return the fields of an event, for the `extra` argument of a logging call."""
    return {"fields": fields}


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Have all events written to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    match log_format:
        case LogFormat.TEXT:
            handler.setFormatter(_Text())
        case LogFormat.JSON:
            handler.setFormatter(_Json())
    ours = logging.getLogger("guestpull_server")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(level.value.upper())
    LIFE.setLevel(logging.INFO)
    other = logging.getLogger()
    other.handlers = [handler]
    other.setLevel(logging.ERROR)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = _event(record)
        told = str(event.pop("event"))
        # what a registry or a caller wrote must not move a terminal's cursor
        plain = told if told.isprintable() else json.dumps(told)[1:-1]
        head = f"{event.pop('time')} {event.pop('level')} {plain}"
        return " ".join([head, *(f"{key}={_quoted(value)}" for key, value in event.items())])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # the standard library's: a path that is no UTF-8 must not cost the line
        return json.dumps(_event(record), default=str, separators=(",", ":"))


def _event(record: logging.LogRecord) -> dict[str, FieldValue]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    event: dict[str, FieldValue] = {
        "time": time.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": record.getMessage(),
    }
    event |= {name: _cut(value) for name, value in getattr(record, "fields", {}).items()}
    if record.exc_info:
        event["traceback"] = logging.Formatter().formatException(record.exc_info)
    return event


def _cut(value: FieldValue) -> FieldValue:
    """Remove the middle of a value that is too long: a caller may have chosen its length."""
    if not isinstance(value, str) or len(value) <= _MAX_VALUE_CHARACTERS:
        return value
    half = _MAX_VALUE_CHARACTERS // 2
    return f"{value[:half]}…{value[-half:]}"


def _quoted(value: FieldValue) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
