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


def test_an_event_is_one_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = lines(capsys, LogFormat.TEXT)

    assert first.endswith(r'Z info pulled request=0badcafe image="a b" bytes=12 name="x=\"y\"\n"')
    assert second.endswith("warning odd \\u001b[31m thing")


def test_an_event_is_one_json_document_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
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
def test_a_path_that_is_no_text_is_told_all_the_same(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    configure(log_format, LogLevel.INFO)
    logging.getLogger("guestpull_server.test").info("pulled", extra=log_fields(path="/b\udcff"))

    (line,) = capsys.readouterr().err.splitlines()
    assert r"/b\udcff" in line


@pytest.mark.parametrize("log_format", LogFormat)
def test_what_a_caller_made_very_long_is_cut_in_its_middle(
    capsys: pytest.CaptureFixture[str], log_format: LogFormat
) -> None:
    configure(log_format, LogLevel.INFO)
    image = f"begin{'x' * 1_000_000}end"
    logging.getLogger("guestpull_server.test").info("pulled", extra=log_fields(image=image))

    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 5_000
    assert "begin" in line
    assert "end" in line


def test_below_the_level_all_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, LogFormat.TEXT, LogLevel.ERROR) == []
