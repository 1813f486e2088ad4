"""How a caller that leaves, or whose time is up, is told to those who work for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestpull_server.errors import Cancelled, DeadlineExceeded


class Cancellation:
    """Tells those who work for a caller that it left, or that its time is up.

    Thread-safe. Callbacks run once, in the thread that cancels; one that is added too late runs at once.

    Args:
        what: what is being done, as an error would name it: "pull of docker.io/library/busybox:latest".
        deadline: `time.monotonic()` at which to give up, or None.
        request: the id of the caller's request, for the log; empty where there is none.
    """

    def __init__(self, what: str, deadline: float | None = None, *, request: str = "") -> None:
        self.request = request
        self._what = what
        self._deadline = deadline
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}

    def cancel(self) -> None:
        """Tell everybody. Repeating it is harmless."""
        with self._lock:
            self._cancelled.set()
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        """Whether the caller left, or its deadline passed."""
        return self._cancelled.is_set() or self.remaining() == 0

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Do nothing as long as the caller waits.

        Raises:
            Cancelled: the caller left.
            DeadlineExceeded: its time is up.
        """
        if self._cancelled.is_set():
            raise Cancelled(self._what)
        if self.remaining() == 0:
            raise DeadlineExceeded(self._what)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than the caller does.

        Raises:
            Cancelled: the caller left meanwhile.
            DeadlineExceeded: its time ran out meanwhile.
        """
        remaining = self.remaining()
        self._cancelled.wait(seconds if remaining is None else min(seconds, remaining))
        self.check()

    @contextmanager
    def nested(self, what: str = "", seconds: float | None = None) -> Iterator[Cancellation]:
        """A cancellation for a part of the work: it ends with this one, but not the other way round.

        Args:
            what: what is being done there; the same as here where it is empty.
            seconds: how long that part may take at most.
        """
        own = None if seconds is None else time.monotonic() + seconds
        deadlines = [deadline for deadline in (self._deadline, own) if deadline is not None]
        inner = Cancellation(what or self._what, min(deadlines, default=None), request=self.request)
        withdraw = self.on_cancel(inner.cancel)
        try:
            yield inner
        finally:
            withdraw()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called when the caller leaves; returns what withdraws it again."""
        key = object()
        with self._lock:
            if not self._cancelled.is_set():
                self._callbacks[key] = callback
                return lambda: self._withdraw(key)
        callback()
        return lambda: None

    def _withdraw(self, key: object) -> None:
        with self._lock:
            self._callbacks.pop(key, None)
