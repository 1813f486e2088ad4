"""What a signal means: before the container runs, the end; while it runs, something for the container to know.

While the agent takes down what it made, signals are not heard: half a release helps nobody.

Python runs handlers in the main thread, between two of its instructions. A main thread that blocks is interrupted
only if the kernel gives the signal to it rather than to one of gRPC's threads, so what may block for long here
waits for the wakeup descriptor too, to which Python's C part writes in whichever thread it is.
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

_WAKEUPS: Final = 4096  # bytes, one a signal
_HEARD: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Interrupted(BaseException):
    """A signal came while no container ran. Like KeyboardInterrupt, it is nothing that code in between catches."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Hears the signals of this process, in its main thread."""

    def __init__(self) -> None:
        self._receiver: Callable[[int], None] = self._interrupt
        self._wakeups, self._waker = socket.socketpair()
        self._wakeups.setblocking(False)
        self._waker.setblocking(False)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, signals raise Interrupted unless they are told to go elsewhere. Once only."""
        waker = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._come) for number in _HEARD}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(waker)
            self._wakeups.close()
            self._waker.close()

    def wait_for(self, process: subprocess.Popen[bytes]) -> int:
        """Hear signals until a process has ended; returns its status as Popen does."""
        if (status := process.poll()) is not None:
            return status
        ended = os.pidfd_open(process.pid)
        waiting = select.poll()  # select() knows no descriptors above 1023
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
        """Within the block, signals go to the receiver."""
        before, self._receiver = self._receiver, receiver
        try:
            yield
        finally:
            self._receiver = before

    def ignore(self) -> None:
        """From now on, signals are not heard."""
        self._receiver = lambda _number: None

    def _come(self, number: int, _frame: FrameType | None) -> None:
        self._receiver(number)

    @staticmethod
    def _interrupt(number: int) -> None:
        raise Interrupted(number)
