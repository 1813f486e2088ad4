"""A fair queue: so many at once, the others in the order in which they came.

    turns = Turns(8)
    with turns.take(cancellation):
        ...                         # at most eight are here

Python's semaphores promise no order: under load a caller may wait for ever while later ones pass it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from guestpull_server.cancellation import Cancellation


class Turns:
    """Lets `limit` holders in at once. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # first come first

    @contextmanager
    def take(self, cancellation: Cancellation) -> Iterator[None]:
        """Wait for a turn, and hold it for as long as the block lasts.

        Raises:
            Cancelled: the caller left while waiting.
            DeadlineExceeded: its time ran out while waiting.
        """
        self._wait(cancellation)
        try:
            yield
        finally:
            self._pass_on()

    def _wait(self, cancellation: Cancellation) -> None:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            my_turn = threading.Event()
            self._waiting.append(my_turn)
        withdraw = cancellation.on_cancel(my_turn.set)
        my_turn.wait(cancellation.remaining())
        withdraw()
        with self._lock:
            # whoever passes a turn on has taken its event out of the queue
            still_waiting = my_turn in self._waiting
            if still_waiting:
                self._waiting.remove(my_turn)
        if still_waiting:
            cancellation.check()
            raise AssertionError("woken without a turn and without a reason")

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1
