"""Shows commands as typed, then what they print; keeps what runs beside them, and ends it.

A command that fails ends the demonstration, loudly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

_WIDTH: Final = 110
_PATIENCE: Final = 30.0  # seconds, for what is started or ended
_BOLD: Final = "\033[1m"
_BLUE: Final = "\033[1;34m"
_PLAIN: Final = "\033[0m"


class DemoFailed(Exception):
    """The demonstration cannot go on; the message is for a person."""


class Stage:
    """A directory on a tmpfs, in which commands are shown.

    Args:
        directory: the tmpfs.
        variables: what the commands find in their environment, beside ours.
    """

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self._environment = {**os.environ, **variables}
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._beside: dict[str, subprocess.Popen[bytes]] = {}

    def chapter(self, title: str) -> None:
        """Begin a part of the story."""
        self._write(f"\n{self._in(_BLUE, f'== {title}')}\n")

    def tell(self, text: str) -> None:
        """Say something to whoever watches."""
        self._write(textwrap.fill(" ".join(text.split()), _WIDTH) + "\n")

    def show(self, command: str) -> str:
        """Show a command, run it, and show what it prints; returns that.

        Raises:
            DemoFailed: its status is not 0.
        """
        self._prompt(command)
        # progress bars go to the terminal as they are; without one, errors come among the output
        errors = None if sys.stderr.isatty() else subprocess.STDOUT
        running = self._popen(command, subprocess.PIPE, errors)
        said: list[str] = []
        assert running.stdout is not None
        for line in running.stdout:
            text = line.decode(errors="replace")
            said.append(text)
            self._write(text)
        if running.wait() != 0:
            raise DemoFailed(f"`{command}` ended with status {running.returncode}")
        return "".join(said)

    def start(self, name: str, command: str, is_ready: Callable[[], bool]) -> None:
        """Show a command that runs beside the others, and wait until it is ready; its output goes to NAME.log.

        Raises:
            DemoFailed: it does not become ready.
        """
        self._prompt(f"{command} &")
        path = self.directory / f"{name}.log"
        with path.open("wb") as log:
            self._beside[name] = self._popen(f"exec {command}", log, subprocess.STDOUT)
        deadline = time.monotonic() + _PATIENCE
        while not is_ready():
            if self._beside[name].poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"`{command}` does not start: {path.read_text(errors='replace')}")
            time.sleep(0.01)

    def end(self, name: str) -> None:
        """Show how what runs beside is ended by SIGTERM.

        Raises:
            DemoFailed: it does not end well.
        """
        process = self._beside.pop(name)
        self._prompt(f"kill {process.pid} && wait  # {name}")
        process.terminate()
        # docker-registry knows no other end than by the signal
        if process.wait(_PATIENCE) not in (0, -signal.SIGTERM):
            raise DemoFailed(f"{name} ended with status {process.returncode}")

    def close(self) -> None:
        """End, at once, what still runs."""
        for process in self._beside.values():
            process.kill()
            process.wait()

    def expect(self, truth: bool, what: str) -> None:
        """Check what was just said to be so.

        Raises:
            DemoFailed: it is not.
        """
        if not truth:
            raise DemoFailed(f"it should be so, and is not: {what}")

    def _prompt(self, command: str) -> None:
        self._write(f"{self._in(_BOLD, f'$ {command}')}\n")

    def _popen(self, command: str, output: int | object, errors: int | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=output,  # type: ignore[arg-type]  # a number or a file, as Popen takes them
            stderr=errors,
        )

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._coloured else text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def tmpfs(directory: Path | None = None) -> Iterator[Path]:
    """A tmpfs, at a directory that is made for it, gone at the end."""
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="guestpull-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=755,size=80%", "tmpfs", directory)
    try:
        yield directory
    finally:
        run("umount", "--recursive", "--lazy", directory)
        directory.rmdir()


def run(*command: str | Path, variables: Mapping[str, str] | None = None) -> str:
    """Run a command that is not shown; returns what it printed.

    Raises:
        DemoFailed: its status is not 0; with what it said.
    """
    environment = {**os.environ, **(variables or {})}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-3000:]
        raise DemoFailed(f"`{' '.join(parts)}` ended with status {done.returncode}:\n{said}")
    return done.stdout
