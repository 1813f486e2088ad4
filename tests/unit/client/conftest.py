"""A client, and a service that answers what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_client import Client
from guestpull_client.cli import main
from support.command_lines import CommandLine, command_line
from support.scripted_service import ScriptedService


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ScriptedService]:
    with ScriptedService(str(tmp_path / "s")) as service:
        yield service


@pytest.fixture
def client(service: ScriptedService) -> Iterator[Client]:
    with Client(service.address) as client:
        yield client


@pytest.fixture
def guestpull(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """The command line `guestpull`, against the service."""
    monkeypatch.setenv("GUESTPULL_ADDRESS", service.address)
    return command_line(main, "guestpull", monkeypatch, capsys)
