"""Log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from guestpull_server.service.log import LIFE, LogFormat, LogLevel, configure, log_fields


@pytest.fixture(autouse=True)
def _restored_loggers() -> Iterator[None]:
    """Undo `configure`: other tests read log records through the root logger."""
    loggers = [logging.getLogger(), logging.getLogger("guestpull_server"), LIFE]
    before = [(one, one.level, list(one.handlers), one.propagate) for one in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers = handlers
        logger.propagate = propagate


def lines(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat, level: LogLevel = LogLevel.INFO
) -> list[str]:
    configure(log_format, level)
    log = logging.getLogger("guestpull_server.test")
    log.debug("quiet")
    log.info("pulled", extra=log_fields(request="0badcafe", image="a b", bytes=12, name='x="y"\n'))
    log.warning("odd \x1b[31m thing")
    return [str(line) for line in capsys.readouterr().err.splitlines()]


def test_the_text_format_writes_an_event_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = lines(capsys, LogFormat.TEXT)

    assert first.endswith(r'Z info pulled request=0badcafe image="a b" bytes=12 name="x=\"y\"\n"')
    assert second.endswith("warning odd \\u001b[31m thing")


def test_the_json_format_writes_an_event_as_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (json.loads(line) for line in lines(capsys, LogFormat.JSON))

    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "event": "pulled",
        "request": "0badcafe",
        "image": "a b",
        "bytes": 12,
        "name": 'x="y"\n',
    }
    assert second["level"] == "warning"


@pytest.mark.parametrize("log_format", LogFormat)
def test_a_path_that_is_not_utf8_is_logged_with_escapes(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    configure(log_format, LogLevel.INFO)
    logging.getLogger("guestpull_server.test").info("pulled", extra=log_fields(path="/b\udcff"))

    (line,) = capsys.readouterr().err.splitlines()
    assert r"/b\udcff" in line


@pytest.mark.parametrize("log_format", LogFormat)
def test_the_middle_of_a_very_long_value_is_removed(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    configure(log_format, LogLevel.INFO)
    image = f"begin{'x' * 1_000_000}end"
    logging.getLogger("guestpull_server.test").info("pulled", extra=log_fields(image=image))

    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 5_000
    assert "begin" in line
    assert "end" in line


def test_events_below_the_level_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, LogFormat.TEXT, LogLevel.ERROR) == []
