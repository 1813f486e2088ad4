"""Calls at a later time, by one thread for all of them.

A `threading.Timer` is a thread each, which costs a warm pull a third of its time; almost all of them are
cancelled long before they are due.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final

# alarms that are cancelled stay in the heap until they are more than this, and half of it
_KEPT_CANCELLED: Final = 64


class _Alarm:
    __slots__ = ("call", "number", "when")

    def __init__(self, when: float, number: int, call: Callable[[], None]) -> None:
        self.when = when
        self.number = number
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: _Alarm) -> bool:
        return (self.when, self.number) < (other.when, other.number)


class Alarms:
    """Thread-safe. The thread is started with the first alarm, and ends with the process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[_Alarm] = []
        self._cancelled = 0
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Have something called after so many seconds; it must not block. Returns what cancels it.

        Raises:
            RuntimeError: no thread can be had.
        """
        alarm = _Alarm(time.monotonic() + seconds, next(self._numbers), call)
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="alarms", daemon=True)
                thread.start()  # where none can be had, the next alarm tries again
                self._thread = thread
            heapq.heappush(self._heap, alarm)
            if self._heap[0] is alarm:
                self._changed.notify()
        return lambda: self._cancel(alarm)

    def _cancel(self, alarm: _Alarm) -> None:
        with self._changed:
            if alarm.call is None:
                return
            alarm.call = None
            self._cancelled += 1
            if self._cancelled > _KEPT_CANCELLED and 2 * self._cancelled > len(self._heap):
                self._heap = [one for one in self._heap if one.call is not None]
                heapq.heapify(self._heap)
                self._cancelled = 0

    def _run(self) -> None:
        while True:
            call = self._next()
            call()

    def _next(self) -> Callable[[], None]:
        """Wait for the next alarm that is due."""
        with self._changed:
            while True:
                if not self._heap:
                    self._changed.wait()
                    continue
                seconds = self._heap[0].when - time.monotonic()
                if seconds > 0:
                    self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
                    continue
                alarm = heapq.heappop(self._heap)
                call, alarm.call = alarm.call, None
                if call is not None:
                    return call
                self._cancelled -= 1


ALARMS: Final = Alarms()
"""Those of this process."""
