"""A semaphore that admits waiters in FIFO order.

    semaphore = FairSemaphore(8)
    with semaphore.acquire(cancellation):
        ...                         # at most eight threads are here

Python's semaphores promise no order: under load a caller may wait forever while later ones pass it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from guestpull_server.cancellation import Cancellation


class FairSemaphore:
    """Admits up to `limit` holders at a time. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def acquire(self, cancellation: Cancellation) -> Iterator[None]:
        """Wait for a turn and hold it while the block runs.

        Raises:
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the caller's time ran out while waiting.
        """
        self._wait(cancellation)
        try:
            yield
        finally:
            self._release()

    def _wait(self, cancellation: Cancellation) -> None:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            woken = threading.Event()
            self._waiting.append(woken)
        withdraw = cancellation.on_cancel(woken.set)
        woken.wait(cancellation.remaining())
        withdraw()
        with self._lock:
            # a release removes the event from the queue before it sets it
            still_waiting = woken in self._waiting
            if still_waiting:
                self._waiting.remove(woken)
        if still_waiting:
            cancellation.check()
            raise AssertionError("woken without a turn and without a reason")

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1
