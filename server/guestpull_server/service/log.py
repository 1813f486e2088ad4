"""Writes each event as one line to standard error, as text or JSON.

    2026-01-31T12:00:00.123Z warning pull failed request=9f2c61d0 image=busybox reason=IMAGE_NOT_FOUND
    {"time":"2026-01-31T12:00:00.123Z","level":"warning","event":"pull failed","request":"9f2c61d0",...}

An event carries fields: `log.info("pulled", extra=log_fields(image=…, bytes=…))`. The start and the end of the
daemon are always logged; other events from the configured level on.
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
"""Logs the start and the end of the daemon."""

FieldValue = str | int | float | bool

_MAX_VALUE_CHARACTERS: Final = 4096  # the longest path


class LogFormat(Enum):
    """The format of log lines."""

    TEXT = "text"
    JSON = "json"


class LogLevel(Enum):
    """The lowest level that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def log_fields(**fields: FieldValue) -> Mapping[str, Mapping[str, FieldValue]]:
    """Return the fields of an event, for the `extra` argument of a logging call."""
    return {"fields": fields}


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Write all events of at least this level to standard error."""
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
        message = str(event.pop("event"))
        # escape text of registries and callers: it must not send control sequences to a terminal
        printable = message if message.isprintable() else json.dumps(message)[1:-1]
        head = f"{event.pop('time')} {event.pop('level')} {printable}"
        return " ".join([head, *(f"{key}={_quoted(value)}" for key, value in event.items())])


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # not msgspec, which raises on a path that is not UTF-8
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
