"""The fork server, as the daemon starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestpull_server.layer.fork_client import ForkClient


def test_nothing_is_imported_from_the_directory_that_the_daemon_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("msgspec", "queue", "gc"):
        (tmp_path / f"{module}.py").write_text("open('imported', 'w').close()\n")
    monkeypatch.chdir(tmp_path)

    ForkClient().close()

    assert not (tmp_path / "imported").exists()
