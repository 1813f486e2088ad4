"""Deadlines and cancellation of network waits.

The timeout of a socket bounds one call to recv(). A server that sends a byte now and then stays below it forever:
in a response header, in the chunk sizes of a body, in a TLS record. So each blocking call on the sockets of
connections.py runs between `Deadline.begin_wait` and `end_wait`, which bounds it by the time that is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import urllib3
from urllib3.exceptions import HTTPError

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits

TransportError = (HTTPError, OSError, ValueError)
"""The errors of a request, or of reading its response, that the network or the server can cause."""

_this_thread = threading.local()


class TooSlow(OSError):
    """The body arrives slower than `limits.min_bytes_per_second`."""


class Deadline:
    """Bounds the network waits of a thread. Close it afterwards.

    The waits end after a number of seconds, at the deadline of `cancellation`, or when it is cancelled.
    """

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._lock = threading.Lock()
        self._wake: Callable[[], object] | None = None
        self._cancelled = False
        self._ends = 0.0
        self._withdraw = cancellation.on_cancel(self._cancel)

    def start(self, seconds: float) -> None:
        """Bound the waits of the current thread from now on; replaces the deadline that it had."""
        remaining = self._cancellation.remaining()
        self._ends = time.monotonic() + (seconds if remaining is None else min(seconds, remaining))
        _this_thread.deadline = self

    def close(self) -> None:
        """Stop observing the cancellation."""
        self._withdraw()

    @staticmethod
    def current() -> Deadline:
        """Return the deadline of the current thread."""
        deadline: Deadline = _this_thread.deadline
        return deadline

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._ends

    def begin_wait(self, wake: Callable[[], object]) -> float:
        """Announce a blocking call; returns the timeout for it. Call `end_wait` afterwards.

        Not a context manager, because it is called for each record of a TLS connection.

        Args:
            wake: ends the call. Called from another thread, and not after `end_wait`.

        Raises:
            TimeoutError: the time is up, or the request was cancelled.
        """
        with self._lock:
            left = self._ends - time.monotonic()
            if left <= 0 or self._cancelled:
                raise TimeoutError
            self._wake = wake
        return left

    def end_wait(self) -> None:
        """End the wait that `begin_wait` announced."""
        with self._lock:
            self._wake = None

    def _cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._wake is not None:
                self._wake()


class Body:
    """The body of a response, read within `limits.read_timeout` and `limits.min_bytes_per_second`."""

    def __init__(
        self, response: urllib3.BaseHTTPResponse, cancellation: Cancellation, limits: Limits
    ) -> None:
        self.response = response
        self._cancellation = cancellation
        self._limits = limits
        self._deadline = Deadline(cancellation)
        self._seconds = 0.0
        self._bytes = 0
        self._at_end = False

    def read(self, limit: int) -> bytes:
        """Return the bytes that are available, at most `limit`; empty at the end.

        Raises:
            TransportError: the connection broke, stalled, or is too slow.
            Cancelled: the request was cancelled.
            DeadlineExceeded: the deadline of the request passed.
        """
        started = time.monotonic()
        self._deadline.start(self._limits.read_timeout)
        try:
            piece = self.response.read1(limit)
        except TransportError:
            self._cancellation.check()
            raise
        self._cancellation.check()
        self._at_end = not piece
        self._bytes += len(piece)
        # time that the caller spends between reads does not count
        self._seconds += time.monotonic() - started
        if self._seconds >= self._limits.read_timeout:
            self._check_pace()
        return piece

    def _check_pace(self) -> None:
        minimum = self._limits.min_bytes_per_second
        if not self._at_end and self._bytes < minimum * self._seconds:
            raise TooSlow(f"slower than limits.min_bytes_per_second ({minimum})")
        self._seconds, self._bytes = 0.0, 0

    def close(self, *, broken: bool) -> None:
        """Return the connection to the pool, or close it if it is broken or not at the end of the body."""
        self._deadline.close()
        # if the response has a Content-Length, urllib3 released the connection with the last byte
        if broken or not (self._at_end or self.response.closed):
            self.response.close()
        else:
            self.response.release_conn()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, type_: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close(broken=type_ is not None)
