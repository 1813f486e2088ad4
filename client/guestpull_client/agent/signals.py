"""What a signal means: before the container runs, the end; while it runs, something for the container to know.

While the agent takes down what it made, signals are not heard: half a release helps nobody.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

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

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, signals raise Interrupted unless they are told to go elsewhere."""
        before = {number: signal.signal(number, self._come) for number in _HEARD}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
