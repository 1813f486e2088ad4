"""Shows commands and their output, and runs daemons in the background.

A command that fails ends the demonstration with an error.
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
_PATIENCE: Final = 30.0  # seconds, for a daemon to start or stop
_BOLD: Final = "\033[1m"
_BLUE: Final = "\033[1;34m"
_PLAIN: Final = "\033[0m"


class DemoFailed(Exception):
    """The demonstration cannot go on; the message is for a person."""


class Stage:
    """A directory on a tmpfs, in which commands are shown and run.

    Args:
        directory: the tmpfs.
        variables: environment variables of the commands, in addition to ours.
    """

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self.directory = directory
        self._environment = {**os.environ, **variables}
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._beside: dict[str, subprocess.Popen[bytes]] = {}

    def chapter(self, title: str) -> None:
        """Print the title of a part."""
        self._write(f"\n{self._in(_BLUE, f'== {title}')}\n")

    def tell(self, text: str) -> None:
        """Print an explanation."""
        self._write(textwrap.fill(" ".join(text.split()), _WIDTH) + "\n")

    def show(self, command: str) -> str:
        """Show a command, run it, and show and return its output.

        Raises:
            DemoFailed: the exit status is not 0.
        """
        self._prompt(command)
        # let progress bars go to the terminal; without one, merge standard error into the output
        errors = None if sys.stderr.isatty() else subprocess.STDOUT
        running = self._popen(command, subprocess.PIPE, errors)
        shown: list[str] = []
        assert running.stdout is not None
        for line in running.stdout:
            text = line.decode(errors="replace")
            shown.append(text)
            self._write(text)
        if running.wait() != 0:
            raise DemoFailed(f"`{command}` ended with status {running.returncode}")
        return "".join(shown)

    def start(self, name: str, command: str, is_ready: Callable[[], bool]) -> None:
        """Show and start a command in the background, and wait until it is ready; its output goes to NAME.log.

        Raises:
            DemoFailed: the command does not become ready.
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
        """Show and send a SIGTERM to a background command, and wait for its exit.

        Raises:
            DemoFailed: the command does not exit cleanly.
        """
        process = self._beside.pop(name)
        self._prompt(f"kill {process.pid} && wait  # {name}")
        process.terminate()
        # docker-registry does not handle SIGTERM
        if process.wait(_PATIENCE) not in (0, -signal.SIGTERM):
            raise DemoFailed(f"{name} ended with status {process.returncode}")

    def close(self) -> None:
        """Kill the background commands that still run."""
        for process in self._beside.values():
            process.kill()
            process.wait()

    def expect(self, truth: bool, what: str) -> None:
        """Check that a statement holds.

        Raises:
            DemoFailed: the statement does not hold.
        """
        if not truth:
            raise DemoFailed(f"this does not hold: {what}")

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
    """Mount a tmpfs at a new directory for a block; unmount and remove it at the end."""
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
    """Run a command without showing it; return its output.

    Raises:
        DemoFailed: the exit status is not 0; the error includes the output.
    """
    environment = {**os.environ, **(variables or {})}
    parts = [str(part) for part in command]
    done = subprocess.run(parts, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        shown = (done.stderr or done.stdout).strip()[-3000:]
        raise DemoFailed(f"`{' '.join(parts)}` ended with status {done.returncode}:\n{shown}")
    return done.stdout
