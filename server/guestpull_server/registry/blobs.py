"""One blob, streamed: verified as it comes, and resumed where it broke off.

Bytes that were handed on are never asked for again: a broken or stalled connection is followed by a request
for the rest (Range), and where a registry ignores that, what is known already is skipped.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from http import HTTPStatus
from types import TracebackType
from typing import Final, Protocol, Self

import urllib3

from guestpull_server.config import Limits
from guestpull_server.errors import BlobNotFound, DigestMismatch, RegistryUnavailable, SizeMismatch
from guestpull_server.models import Cancellation, Descriptor, KiB
from guestpull_server.registry.session import Session, plain
from guestpull_server.registry.transport import TransportError, ended_by

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_PROGRESS: Final = 256 * KiB
"""A connection that brought less than this counts as a failed attempt; others start the count again."""
_MAX_CONNECTIONS: Final = 1000


class BlobStream(Protocol):
    """The bytes of one blob, in order, from wherever. A context manager; leaving it lets go of everything."""

    @property
    def received_bytes(self) -> int:
        """Bytes that came over the wire so far, those that came twice included."""

    def read(self, limit: int) -> bytes:
        """The next bytes, as many as there are at once and at most `limit`; none at the end.

        The end is told only after size and digest of the whole were verified.

        Raises:
            DigestMismatch: the bytes do not have the descriptor's digest.
            SizeMismatch: they are more or fewer than it says.
            GuestpullError: they cannot be had.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class RegistryBlob:
    """A BlobStream from a registry."""

    def __init__(
        self, session: Session, blob: Descriptor, cancellation: Cancellation, limits: Limits
    ) -> None:
        self.received_bytes = 0
        self._session = session
        self._blob = blob
        self._cancellation = cancellation
        self._limits = limits
        self._hash = blob.digest.hasher()
        self._offset = 0
        self._skip = 0
        self._fruitless = 0
        self._connections = 0
        self._response: urllib3.BaseHTTPResponse | None = None
        self._watch = ExitStack()
        self._window_start = 0.0
        self._window_bytes = 0
        self._connected_at = 0

    def read(self, limit: int) -> bytes:
        """See BlobStream."""
        while True:
            if self._offset == self._blob.size:
                self._finish()
                return b""
            if self._response is None:
                self._connect()
            piece = self._receive(limit)
            if not piece:
                continue
            if self._skip:
                skipped = min(self._skip, len(piece))
                self._skip -= skipped
                piece = piece[skipped:]
                if not piece:
                    continue
            if self._offset + len(piece) > self._blob.size:
                self._disconnect()
                raise self._wrong_size(self._offset + len(piece))
            self._offset += len(piece)
            self._hash.update(piece)
            return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._disconnect()

    # -- the end --------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._response is not None:
            # a registry that has not said how long the blob is may have more
            more = self._receive(1) if self._response.headers.get("Content-Length") is None else b""
            if more:
                self._disconnect()
                raise self._wrong_size(self._offset + 1)
            if self._response is not None:
                self._response.release_conn()
            self._let_go()
        actual = f"{self._blob.digest.algorithm}:{self._hash.hexdigest()}"
        if actual != self._blob.digest:
            raise DigestMismatch(
                f"{self._session.reference}: blob", self._blob.digest, actual, self._session.host
            )

    def _wrong_size(self, actual: int) -> SizeMismatch:
        what = f"{self._session.reference}: blob {self._blob.digest}"
        return SizeMismatch(what, self._blob.size, actual, self._session.host)

    # -- connections ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._connections += 1
        headers = {"Range": f"bytes={self._offset}-"} if self._offset else {}
        response = self._session.get(f"blobs/{self._blob.digest}", headers, self._cancellation)
        self._response = response
        self._watch.enter_context(ended_by(self._cancellation, response))
        self._window_start, self._window_bytes, self._connected_at = time.monotonic(), 0, self._offset
        if response.status == HTTPStatus.NOT_FOUND:
            self._disconnect()
            raise BlobNotFound(self._session.reference, self._blob.digest, self._session.host)
        length = _content_length(response)
        if response.status == HTTPStatus.PARTIAL_CONTENT and self._offset:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) > self._offset:
                self._failed("it sends another part of a blob than the one that it was asked for")
                return
            self._skip = self._offset - int(match[1])
            expected = self._blob.size - int(match[1])
        elif response.status == HTTPStatus.OK:
            self._skip = self._offset
            expected = self._blob.size
        else:
            self._failed(f"it answers {response.status} to a request for a part of a blob")
            return
        if length is not None and length != expected:
            self._disconnect()
            raise self._wrong_size(self._blob.size - expected + length)

    def _receive(self, limit: int) -> bytes:
        """Bytes of the response; none where the connection failed, and another attempt is to be made."""
        if self._response is None:
            return b""
        if self._is_too_slow():
            minimum = self._limits.min_bytes_per_second
            self._failed(f"it sends less than limits.min_bytes_per_second ({minimum})")
            return b""
        try:
            piece = self._response.read1(limit)
        except TransportError as error:
            self._cancellation.check()
            self._failed(plain(error))
            return b""
        self._cancellation.check()
        if not piece:
            if self._offset < self._blob.size:
                self._failed("the connection broke off in the middle of a blob")
            return b""
        self.received_bytes += len(piece)
        self._window_bytes += len(piece)
        return piece

    def _is_too_slow(self) -> bool:
        """Whether less came than may be expected, since the last time that this was asked in earnest."""
        seconds = time.monotonic() - self._window_start
        if seconds < self._limits.read_timeout:
            return False
        too_slow = self._window_bytes < self._limits.min_bytes_per_second * seconds
        self._window_start, self._window_bytes = time.monotonic(), 0
        return too_slow

    def _failed(self, problem: str) -> None:
        """Give this connection up; wait before the next, or raise where there was no good in the last ones."""
        self._fruitless = 1 if self._offset - self._connected_at >= _PROGRESS else self._fruitless + 1
        self._disconnect()
        if self._fruitless >= self._limits.max_attempts or self._connections >= _MAX_CONNECTIONS:
            session = self._session
            raise RegistryUnavailable(session.reference, session.host, problem, self._connections)
        self._session.backoff(self._fruitless, self._cancellation)

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._let_go()

    def _let_go(self) -> None:
        self._watch.close()
        self._response = None
        self._skip = 0


def _content_length(response: urllib3.BaseHTTPResponse) -> int | None:
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isdecimal() and len(value) < 20 else None
