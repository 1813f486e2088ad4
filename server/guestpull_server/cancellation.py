"""Cancellation and deadlines of one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestpull_server.errors import Cancelled, DeadlineExceeded


class Cancellation:
    """The cancellation and the deadline of one request, shared by all threads that work on it.

    Thread-safe. Callbacks run once, in the thread that cancels. A callback that is added after the cancellation
    runs immediately.

    Args:
        what: the name of the work in errors, such as "pull of docker.io/library/busybox:latest".
        deadline: value of `time.monotonic()` at which to give up; None for no deadline.
        request: the id of the request in the log; empty if there is none.
    """

    def __init__(self, what: str, deadline: float | None = None, *, request: str = "") -> None:
        self.request = request
        self._what = what
        self._deadline = deadline
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}

    def cancel(self) -> None:
        """Cancel the work and run the callbacks. Repeating it is harmless."""
        with self._lock:
            self._cancelled.set()
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        """Whether the caller cancelled or the deadline has passed."""
        return self._cancelled.is_set() or self.remaining() == 0

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Raise an error if the request was cancelled or its deadline has passed.

        Raises:
            Cancelled: the caller cancelled.
            DeadlineExceeded: the deadline has passed.
        """
        if self._cancelled.is_set():
            raise Cancelled(self._what)
        if self.remaining() == 0:
            raise DeadlineExceeded(self._what)

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over, the caller cancels, or the deadline passes.

        Raises:
            Cancelled: the caller cancelled.
            DeadlineExceeded: the deadline passed.
        """
        remaining = self.remaining()
        self._cancelled.wait(seconds if remaining is None else min(seconds, remaining))
        self.check()

    @contextmanager
    def nested(self, what: str = "", seconds: float | None = None) -> Iterator[Cancellation]:
        """Create a cancellation for a part of the work; cancelling this one cancels it, but not vice versa.

        Args:
            what: the name of that part in errors; empty for the same name.
            seconds: time limit of that part; None for no limit of its own.
        """
        own_deadline = None if seconds is None else time.monotonic() + seconds
        deadlines = [deadline for deadline in (self._deadline, own_deadline) if deadline is not None]
        inner = Cancellation(what or self._what, min(deadlines, default=None), request=self.request)
        remove_callback = self.on_cancel(inner.cancel)
        try:
            yield inner
        finally:
            remove_callback()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the request is cancelled; return a function that removes the callback."""
        key = object()
        with self._lock:
            if not self._cancelled.is_set():
                self._callbacks[key] = callback
                return lambda: self._remove_callback(key)
        callback()
        return lambda: None

    def _remove_callback(self, key: object) -> None:
        with self._lock:
            self._callbacks.pop(key, None)
