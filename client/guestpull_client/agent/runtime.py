"""Runs one container in the foreground with an OCI runtime, runc or crun."""

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

_STOPS_BEFORE_KILL: Final = 3  # kill the container after this many stop signals, as docker run does
_STOP_SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_POLL_SECONDS: Final = 0.001


class Runtime:
    """The command line of runc, which crun shares.

    Args:
        program: name or path of the runtime.
        stop_seconds: time between SIGTERM and SIGKILL for the container to exit.
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
        on_start: Callable[[], None] | None,
    ) -> int:
        """Run a container until it exits, delete it, and return its exit status.

        Signals are forwarded to the container. If it is still running `stop_seconds` after SIGTERM, or after three
        signals that should stop it, it gets SIGKILL: the first process of a container ignores signals that it does
        not handle.

        Args:
            container_id: unique on this machine.
            bundle: the container's bundle.
            signals: the signals of this process.
            terminal: whether the container gets this process's terminal.
            on_start: called when the container's process has started, if not None.

        Raises:
            FailedPrecondition: the runtime cannot be started.
        """
        with tempfile.TemporaryDirectory(prefix="guestpull-agent-") as directory:
            pid_file = os.path.join(directory, "pid")
            command = [self._program, "run", "--bundle", bundle, "--pid-file", pid_file, container_id]
            try:
                # A container without a terminal of its own must not get Ctrl-C twice, from our terminal and
                # from us: start the runtime in a new session. In a new process group, runc would loop on
                # SIGTTOU.
                process = subprocess.Popen(command, start_new_session=not terminal)
            except OSError as error:
                raise FailedPrecondition(
                    f"Cannot start {self._program}: {error.strerror}. "
                    "Install an OCI runtime, or name another with --runtime.",
                    "NO_RUNTIME",
                    {"runtime": self._program},
                ) from None
            relay = _Relay(process, self._stop_seconds, lambda: self._command("kill", container_id, "KILL"))
            with signals.sent_to(relay.forward):
                if on_start is not None and _wait_for_file(pid_file, process):
                    on_start()
                status = signals.wait_for(process)
            relay.close()
        if status < 0:
            # the runtime itself was killed and could not clean up
            self._command("delete", "--force", container_id)
            return 128 - status
        return status

    def _command(self, *arguments: str) -> None:
        subprocess.run([self._program, *arguments], check=False, capture_output=True)


class _Relay:
    """Forwards signals to the runtime, and kills a container that does not stop."""

    def __init__(
        self, process: subprocess.Popen[bytes], stop_seconds: float, kill: Callable[[], None]
    ) -> None:
        self._process = process
        self._stop_seconds = stop_seconds
        self._kill = kill
        self._stops = 0
        self._kill_timer: threading.Timer | None = None

    def forward(self, number: int) -> None:
        """Forward a signal, and kill the container if it was asked to stop often enough."""
        self._process.send_signal(number)
        if number in _STOP_SIGNALS:
            self._stops += 1
        if self._stops >= _STOPS_BEFORE_KILL:
            self._kill()
        elif number == signal.SIGTERM and self._kill_timer is None:
            self._kill_timer = threading.Timer(self._stop_seconds, self._kill)
            self._kill_timer.daemon = True
            self._kill_timer.start()

    def close(self) -> None:
        """Stop the kill timer; the container has exited."""
        if self._kill_timer is not None:
            self._kill_timer.cancel()


def _wait_for_file(path: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a file exists or the process exits; return whether the file exists."""
    while not os.path.exists(path):
        if process.poll() is not None:
            return os.path.exists(path)
        time.sleep(_POLL_SECONDS)
    return True
