"""Handles the agent's signals: before the container runs they end the agent, then they go to the container.

During the release of the bundle, signals are ignored, so that the release is complete.

Python runs signal handlers in the main thread, between two bytecode instructions. The kernel may deliver a
signal to one of gRPC's threads, which does not interrupt a blocking call in the main thread. Waits that may be
long therefore also poll the wakeup descriptor, which Python's C handler writes to in any thread.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_WAKEUPS: Final = 4096  # bytes, one per signal
_HANDLED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Interrupted(BaseException):
    """A signal arrived while no container was running. Like KeyboardInterrupt, not an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Handles the signals of this process, in its main thread."""

    def __init__(self) -> None:
        self._receiver: Callable[[int], None] = self._interrupt
        self._wakeups, self._waker = socket.socketpair()
        self._wakeups.setblocking(False)
        self._waker.setblocking(False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals within a block: raise Interrupted, unless `sent_to` redirects them. Use once."""
        waker = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._receive) for number in _HANDLED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(waker)
            self._wakeups.close()
            self._waker.close()

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        """Handle signals until a process exits; return its status as Popen does."""
        if (status := process.poll()) is not None:
            return status
        ended = os.pidfd_open(process.pid)
        waiting = select.poll()  # select() does not support descriptors above 1023
        waiting.register(ended, select.POLLIN)
        waiting.register(self._wakeups, select.POLLIN)
        try:
            while True:
                if any(ready == ended for ready, _ in waiting.poll()):
                    return process.wait()
                self._wakeups.recv(_WAKEUPS)
        finally:
            os.close(ended)

    @contextmanager
    def sent_to(self, receiver: Callable[[int], None]) -> Iterator[None]:
        """Send signals to the receiver within a block."""
        before, self._receiver = self._receiver, receiver
        try:
            yield
        finally:
            self._receiver = before

    def ignore(self) -> None:
        """Ignore signals from now on."""
        self._receiver = lambda _number: None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._receiver(number)

    @staticmethod
    def _interrupt(number: int) -> None:
        raise Interrupted(number)
