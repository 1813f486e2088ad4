"""What ends the waiting for a server: deadlines, the caller's leaving, and a pace that is too slow.

A thread that waits for the network cannot look at a clock. So others end its wait: a `Watch` shuts the sockets of
an exchange down at its deadline; a `Body` does the same while a response is read, and counts what comes. The
timeout of a socket does not do: what frames a body (the lengths of its chunks, what trails behind the last) may
come for ever without a byte of the body itself.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import urllib3
from urllib3.exceptions import HTTPError

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.registry.alarms import ALARMS

TransportError = (HTTPError, OSError, ValueError)
"""What an exchange, or reading from its response, may raise where the network or the server fails."""

_this_thread = threading.local()


class TooSlow(OSError):
    """Less of a body comes than `limits.read_timeout` and `limits.min_bytes_per_second` ask for."""


def _at_the_end_of(
    cancellation: Cancellation, seconds: float | None, end: Callable[[], None]
) -> Callable[[], None]:
    """Have `end` called when the caller leaves, at its deadline, or after so many seconds.

    Returns what withdraws it.
    """
    left = [one for one in (seconds, cancellation.remaining()) if one is not None]
    withdraw = cancellation.on_cancel(end)
    if not left:
        return withdraw
    cancel = ALARMS.after(min(left), end)

    def withdraw_both() -> None:
        cancel()
        withdraw()

    return withdraw_both


class Watch:
    """A bound on one exchange, from resolving a name to the last byte of a response's header.

    A context manager. While inside, what this thread connects or uses again is attached to it, see `current`.
    """

    def __init__(self, cancellation: Cancellation, seconds: float) -> None:
        self._cancellation = cancellation
        self._seconds = seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._ended = threading.Event()

    @staticmethod
    def current() -> Watch | None:
        """The watch that this thread is in."""
        watch: Watch | None = getattr(_this_thread, "watch", None)
        return watch

    @property
    def ended(self) -> bool:
        """Whether the time is up, or the caller left."""
        return self._ended.is_set()

    def attach(self, connected: socket.socket) -> None:
        """Shut this socket down as well when the watch ends; at once if it has ended."""
        # a duplicate: wrapping a socket in TLS takes the descriptor away from the one that was wrapped
        duplicate = socket.socket(fileno=os.dup(connected.fileno()))
        with self._lock:
            self._sockets.append(duplicate)
        if self.ended:
            self._end()

    def wait_for(self, finished: threading.Event) -> bool:
        """Wait for something that no socket tells; False if the watch ended first."""
        withdraw = self._cancellation.on_cancel(finished.set)
        try:
            remaining = self._cancellation.remaining()
            patience = self._seconds if remaining is None else min(self._seconds, remaining)
            return finished.wait(patience) and not self._cancellation.cancelled
        finally:
            withdraw()

    def __enter__(self) -> Self:
        _this_thread.watch = self
        self._withdraw = _at_the_end_of(self._cancellation, self._seconds, self._end)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        _this_thread.watch = None
        self._withdraw()
        with self._lock:
            for duplicate in self._sockets:
                duplicate.close()
            self._sockets.clear()

    def _end(self) -> None:
        self._ended.set()
        with self._lock:
            for one in self._sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


class Body:
    """A response's body, read by whoever cannot wait for ever. A context manager."""

    def __init__(
        self, response: urllib3.BaseHTTPResponse, cancellation: Cancellation, limits: Limits
    ) -> None:
        self.response = response
        self._cancellation = cancellation
        self._limits = limits
        self._seconds = 0.0
        self._bytes = 0
        self._at_end = False
        self._withdraw = _at_the_end_of(cancellation, None, self._end)
        self._lock = threading.Lock()
        self._reading_since: float | None = None
        self._overdue = False
        self._closed = False
        # one alarm for all reads, which a blob has thousands of: it looks at the one that is going on
        self._cancel_look = ALARMS.after(limits.read_timeout, self._look)

    def read(self, limit: int) -> bytes:
        """What there is, at most `limit` bytes; nothing at the end.

        Raises:
            TransportError: the connection broke, stalled, or is too slow.
            Cancelled: the caller left.
            DeadlineExceeded: its time ran out.
        """
        started = self._reading_since = time.monotonic()
        try:
            piece = self.response.read1(limit)
        except TransportError:
            self._cancellation.check()
            self._check_in_time()
            raise
        finally:
            with self._lock:
                self._reading_since = None
        self._cancellation.check()
        self._check_in_time()
        self._at_end = not piece
        self._bytes += len(piece)
        # the time that the reader takes for itself is no fault of the server's
        self._seconds += time.monotonic() - started
        if self._seconds >= self._limits.read_timeout:
            self._check_pace()
        return piece

    def _look(self) -> None:
        """End the read that is going on if it takes too long, and look again when the next one may."""
        patience = self._limits.read_timeout
        with self._lock:
            if self._closed:
                return
            now = time.monotonic()
            since = now if self._reading_since is None else self._reading_since
            self._overdue = now - since >= patience
            if self._overdue:
                self._end()
            else:
                self._cancel_look = ALARMS.after(since + patience - now, self._look)

    def _check_in_time(self) -> None:
        if self._overdue:
            raise TooSlow("it sends nothing in time")

    def _check_pace(self) -> None:
        minimum = self._limits.min_bytes_per_second
        if not self._at_end and self._bytes < minimum * self._seconds:
            raise TooSlow(f"it sends less than limits.min_bytes_per_second ({minimum})")
        self._seconds, self._bytes = 0.0, 0

    def close(self, *, broken: bool) -> None:
        """Let go of it; the connection is kept for the next exchange if it is not broken and at its end."""
        self._withdraw()
        with self._lock:
            self._closed = True
            self._cancel_look()
        # where a length was given, urllib3 has let go of the connection with the last byte already
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

    def _end(self) -> None:
        with suppress(*TransportError, RuntimeError):
            self.response.shutdown()
