"""An OCI runtime, runc or crun, that runs one container in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Final

from guestpull_client.agent.signals import Signals
from guestpull_client.errors import FailedPrecondition

_PATIENCE: Final = 3  # signals to end until the container is killed, as docker run
_ENDINGS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_POLL_SECONDS: Final = 0.001


class Runtime:
    """A runtime's command line (runc's, which crun shares).

    Args:
        program: its name or path.
        stop_seconds: between a SIGTERM and the SIGKILL for a container that did not end.
    """

    def __init__(self, program: str, stop_seconds: float) -> None:
        self._program = program
        self._stop_seconds = stop_seconds

    def run(
        self,
        container_id: str,
        bundle: str,
        signals: Signals,
        *,
        terminal: bool,
        running: Callable[[], None] | None,
    ) -> int:
        """Run a container to its end, and leave nothing of it; returns its exit status.

        A signal goes to the container. SIGTERM is followed by SIGKILL if it does not end, and so are three signals
        of those that should end it: the first process of a container ignores what it has no handler for.

        Args:
            container_id: unique on this machine.
            bundle: its bundle.
            signals: where signals come from.
            terminal: whether the container gets this process's terminal.
            running: called when the container's process has started, if that matters.

        Raises:
            FailedPrecondition: the runtime is not there.
        """
        with tempfile.TemporaryDirectory(prefix="guestpull-agent-") as directory:
            pid_file = os.path.join(directory, "pid")
            command = [self._program, "run", "--bundle", bundle, "--pid-file", pid_file, container_id]
            try:
                # Without a terminal of its own the container must not get a terminal's Ctrl-C twice, from it and
                # from us: so the runtime has its own session. A process group does not do, runc spins in SIGTTOU.
                process = subprocess.Popen(command, start_new_session=not terminal)
            except OSError as error:
                raise FailedPrecondition(
                    f"{self._program} cannot be started: {error.strerror}. "
                    "Install an OCI runtime, or name another with --runtime.",
                    "NO_RUNTIME",
                    {"runtime": self._program},
                ) from None
            relay = _Relay(process, self._stop_seconds, lambda: self._command("kill", container_id, "KILL"))
            with signals.sent_to(relay.pass_on):
                if running is not None and _appears(pid_file, process):
                    running()
                status = signals.wait_for(process)
            relay.close()
        if status < 0:
            # the runtime itself was killed, and could not clean up
            self._command("delete", "--force", container_id)
            return 128 - status
        return status

    def _command(self, *arguments: str) -> None:
        subprocess.run([self._program, *arguments], check=False, capture_output=True)


class _Relay:
    """Passes signals on to a runtime, which passes them on to its container; ends one that does not end."""

    def __init__(
        self, process: subprocess.Popen[bytes], stop_seconds: float, kill: Callable[[], None]
    ) -> None:
        self._process = process
        self._stop_seconds = stop_seconds
        self._kill = kill
        self._endings = 0
        self._clock: threading.Timer | None = None

    def pass_on(self, number: int) -> None:
        """A signal came."""
        self._process.send_signal(number)
        if number in _ENDINGS:
            self._endings += 1
        if self._endings >= _PATIENCE:
            self._kill()
        elif number == signal.SIGTERM and self._clock is None:
            self._clock = threading.Timer(self._stop_seconds, self._kill)
            self._clock.daemon = True
            self._clock.start()

    def close(self) -> None:
        """The container has ended."""
        if self._clock is not None:
            self._clock.cancel()


def _appears(path: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a file is there, or the process has ended without it."""
    while not os.path.exists(path):
        if process.poll() is not None:
            return os.path.exists(path)
        time.sleep(_POLL_SECONDS)
    return True
