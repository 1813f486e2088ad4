"""Shares turns fairly among keys, such as registries.

    semaphore = FairSemaphore(8, share=as_many_as_are_free)
    with semaphore.acquire(cancellation, "registry.example"):
        ...                         # at most eight threads run this

A share limits how many turns one key may hold, so that one slow registry never holds all of them. Among the
waiters whose key may hold another turn, the waiter whose key holds the fewest goes first; ties are resolved in
FIFO order.

Python's semaphores do not guarantee an order: under load, a caller may wait forever while later ones pass it.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeAlias, TypeVar

from guestpull_server.cancellation import Cancellation

Share: TypeAlias = Callable[[int], int]
"""Given the number of free turns, returns how many turns one key may hold."""

_Waiter = TypeVar("_Waiter")


def as_many_as_are_free(free: int) -> int:
    """A share that always leaves a reserve: a key may hold at most as many turns as are free.

    A single key gets half of the turns, a second one half of the rest, and so on (the dynamic thresholds of
    shared-memory switches: Choudhury and Hahne, 1998).
    """
    return free


class FairQueue(Generic[_Waiter]):
    """Tracks held turns and waiters, and selects the next waiter. Not thread-safe.

    Args:
        limit: the number of turns.
        share: limits how many turns one key may hold. None means no limit.
    """

    def __init__(self, limit: int, share: Share | None = None) -> None:
        self._free = limit
        self._share: Share = share or (lambda _free: limit)
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, _Waiter]]] = {}
        self._numbers = itertools.count()

    def put(self, key: str, waiter: _Waiter) -> None:
        """Add a waiter to the end of the queue."""
        self._waiting.setdefault(key, deque()).append((next(self._numbers), waiter))

    def remove(self, key: str, waiter: _Waiter) -> bool:
        """Remove a waiter. Return whether it was still waiting."""
        for place in self._waiting.get(key, ()):
            if place[1] is waiter:
                self._drop(key, place)
                return True
        return False

    def take(self) -> _Waiter | None:
        """Give the next waiter a turn and return it. Return None if no waiter may have one."""
        ranks = [
            (self._held[key], places[0][0], key)
            for key, places in self._waiting.items()
            if self._free > 0 and self._held[key] < self._share(self._free)
        ]
        if not ranks:
            return None
        key = min(ranks)[2]
        place = self._waiting[key][0]
        self._drop(key, place)
        self._held[key] += 1
        self._free -= 1
        return place[1]

    def give_back(self, key: str) -> None:
        """Return a turn that a waiter with this key held."""
        self._free += 1
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]

    def _drop(self, key: str, place: tuple[int, _Waiter]) -> None:
        self._waiting[key].remove(place)
        if not self._waiting[key]:
            del self._waiting[key]


class FairSemaphore:
    """A FairQueue in which threads wait. Thread-safe.

    Args:
        limit: the number of turns.
        share: limits how many turns one key may hold. None means no limit.
    """

    def __init__(self, limit: int, share: Share | None = None) -> None:
        self._lock = threading.Lock()
        self._queue: FairQueue[threading.Event] = FairQueue(limit, share)

    @contextmanager
    def acquire(self, cancellation: Cancellation, key: str = "") -> Iterator[None]:
        """Wait for a turn and hold it while the block runs.

        Raises:
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the caller's time ran out while waiting.
        """
        self._wait(cancellation, key)
        try:
            yield
        finally:
            with self._lock:
                self._queue.give_back(key)
                self._wake()

    def _wait(self, cancellation: Cancellation, key: str) -> None:
        woken = threading.Event()
        with self._lock:
            self._queue.put(key, woken)
            self._wake()
            if woken.is_set():
                return
        withdraw = cancellation.on_cancel(woken.set)
        woken.wait(cancellation.remaining())
        withdraw()
        with self._lock:
            # the queue removes a waiter when it gives it a turn: this waiter either holds a turn or still waits
            still_waiting = self._queue.remove(key, woken)
        if still_waiting:
            cancellation.check()
            raise AssertionError("woken without a turn and without a reason")

    def _wake(self) -> None:
        while (woken := self._queue.take()) is not None:
            woken.set()
