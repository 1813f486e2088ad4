"""Runs a guestpulld as users do: in a separate process, on a tmpfs.

    with Tmpfs(tmp_path / "disk") as disk, Daemon(disk) as daemon:
        pulled = daemon.client.pull(reference, str(daemon.bundle("one")))
        daemon.kill()
        daemon.start()

Leaving `Daemon` stops the process and unmounts its bundles; leaving `Tmpfs` checks that nothing is mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guestpull_client import Client
from guestpull_client.errors import GuestpullError
from support.peers import run
from support.waiting import PATIENCE, until


def mounts_below(directory: Path) -> list[str]:
    """The mount points below a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]
    return [point for point in points if point.startswith(f"{directory}/")]


class Tmpfs:
    """A tmpfs, as a context manager that returns its directory."""

    def __init__(self, directory: Path, size: str = "1g") -> None:
        self._directory = directory
        self._size = size

    def __enter__(self) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", f"size={self._size}", "tmpfs", str(self._directory))
        return self._directory

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        left = mounts_below(self._directory)
        for point in reversed(left):
            run("umount", "--lazy", point, check=False)
        run("umount", "--lazy", str(self._directory))
        if error_type is None:
            assert left == [], f"these were left mounted: {left}"


class Daemon:
    """A guestpulld with a work directory below `disk`, as a context manager.

    Args:
        disk: a directory for the work directory, the socket and bundles.
        work_dir: another work directory.
        configuration: the content of its config.json.
        options: additional options of `guestpulld serve`.
    """

    def __init__(
        self,
        disk: Path,
        *,
        work_dir: Path | None = None,
        configuration: Mapping[str, Any] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self.disk = disk
        self.work_dir = work_dir or disk / "work"
        self.socket = str(disk / f"{self.work_dir.name}.sock")
        self.log = disk / f"{self.work_dir.name}.log"
        self._configuration = configuration or {}
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    def __enter__(self) -> Self:
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if self._configuration:
            (self.work_dir / "config.json").write_text(json.dumps(self._configuration))
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(GuestpullError):
                for bundle in self.client.bundles():
                    self.client.release_bundle(bundle.bundle_path)
            self.stop()

    @property
    def client(self) -> Client:
        """A client connected to this daemon."""
        if self._client is None:
            self._client = Client(f"unix://{self.socket}", timeout=60)
        return self._client

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        """Start it without waiting."""
        command = [sys.executable, "-m", "guestpull_server.cli", "serve", "--work-dir", str(self.work_dir)]
        command += ["--listen", f"unix://{self.socket}", "--log-level", "debug", *self._options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def start(self) -> None:
        """Start it, and wait until it reports that it is serving."""
        self.launch()
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(GuestpullError):
                if self.client.is_healthy():
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"guestpulld does not serve:\n{self.log.read_text()}")
            self._forget_client()
            time.sleep(0.02)

    def stop(self) -> int:
        """Stop it with SIGTERM; return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(PATIENCE)
        self._forget_client()
        return status

    def kill(self) -> None:
        """Kill it with SIGKILL, and wait until its workers have exited too."""
        assert self._process is not None
        family = [self.pid, *_descendants(self.pid)]
        self._process.kill()
        self._process.wait(PATIENCE)
        until("no process outlives the daemon that was killed", lambda: not any(map(_is_alive, family)))
        self._forget_client()

    def workers(self) -> list[int]:
        """Process ids of the running fork server and layer workers."""
        return _descendants(self.pid)

    def await_log(self, pattern: str) -> re.Match[str]:
        """Wait until a regular expression matches in the log; return the match."""
        until(f"the log has {pattern}", lambda: re.search(pattern, self.log.read_text()))
        found = re.search(pattern, self.log.read_text())
        assert found is not None
        return found

    def bundle(self, name: str) -> Path:
        """The path for a test's bundle."""
        return self.disk / "bundles" / name

    def meta_store(self) -> dict[str, Any]:
        """The content of meta_store.json."""
        content: dict[str, Any] = json.loads((self.work_dir / "meta_store.json").read_text())
        return content

    def staged(self) -> list[str]:
        """The names in staging/."""
        return os.listdir(self.work_dir / "staging")

    def forget_layer(self, compressed_digest: str) -> None:
        """Delete a layer's directory behind the daemon's back."""
        shutil.rmtree(self.work_dir / "layers" / compressed_digest.replace(":", "_"))

    def _forget_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
            for child in map(int, children):
                found += [child, *_descendants(child)]
    return found


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
