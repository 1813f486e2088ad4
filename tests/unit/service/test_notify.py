"""Reporting states to a service manager."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from guestpull_server.service.notify import notify
from support.waiting import PATIENCE


@pytest.mark.parametrize("form", ["path", "abstract"])
def test_a_state_is_sent_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "n") if form == "path" else f"@guestpull-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(name if form == "path" else f"\0{name[1:]}")
        monkeypatch.setenv("NOTIFY_SOCKET", name)

        notify("READY=1")

        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("value", ["", "/nowhere/socket", "@nobody-listens-there", "vsock:2:1"])
def test_an_unreachable_manager_is_ignored(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)

    notify("READY=1")
