"""Blob downloads: streamed, verified, and resumed after failures.

After a broken or stalled connection, the rest of the blob is requested (Range). If the registry ignores the range,
the bytes that were already returned are skipped. If an endpoint fails finally, the download continues at the next
endpoint from the same position. The digest of the whole blob is verified at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

import urllib3

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    DigestMismatch,
    GuestpullError,
    RegistryUnavailable,
    SizeMismatch,
)
from guestpull_server.models import Descriptor, KiB
from guestpull_server.registry.deadlines import Body, TransportError
from guestpull_server.registry.failures import plain
from guestpull_server.registry.session import Session

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_PROGRESS: Final = 256 * KiB
"""A connection that received at least this much resets the count of failed attempts."""
_MAX_CONNECTIONS: Final = 1000
_MAX_PIECE: Final = 1024 * KiB


def _have_malloc_keep_pages() -> None:
    """Free one large block, which makes glibc's malloc keep the pages of smaller ones.

    Otherwise each piece is read into pages that the kernel must clear: 1.4 s of CPU time per GiB instead of 0.7.
    """
    bytes(_MAX_PIECE + 64 * KiB)


_have_malloc_keep_pages()


class RegistryBlob:
    """A BlobStream from a registry or its mirrors.

    Args:
        sessions: the endpoints to use, in order; one or more.
        blob: the expected digest and size.
        cancellation: of the request.
        limits: timeouts and number of attempts.
        distrust: called for each endpoint that sent a part of a blob with a wrong digest.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        blob: Descriptor,
        cancellation: Cancellation,
        limits: Limits,
        distrust: Callable[[Session], None],
    ) -> None:
        self.received_bytes = 0
        self._session, *self._others = sessions
        self._blob = blob
        self._cancellation = cancellation
        self._limits = limits
        self._distrust = distrust
        self._used: list[Session] = []
        self._hash = blob.digest.hasher()
        self._offset = 0
        self._skip = 0
        self._knows_ranges = True
        self._failures = 0
        self._connections = 0
        self._body: Body | None = None
        self._connected_at = 0

    def read(self, limit: int) -> bytes:
        """See BlobStream."""
        while self._offset < self._blob.size:
            if self._body is None:
                self._connect()
                continue
            piece = self._receive(self._body, min(limit, _MAX_PIECE))
            if self._skip:
                skipped = min(self._skip, len(piece))
                self._skip -= skipped
                piece = piece[skipped:]
            if self._offset + len(piece) > self._blob.size:
                self._give_up(self._wrong_size(self._offset + len(piece)))
                continue
            if piece:
                self._offset += len(piece)
                self._hash.update(piece)
                return piece
        self._finish()
        return b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._disconnect(broken=True)

    # -- the end --------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._body is not None:
            # without a Content-Length, more bytes can follow
            no_length = self._body.response.headers.get("Content-Length") is None
            try:
                more = self._body.read(1) if no_length else b""
            except TransportError:
                more = b""
            self._disconnect(broken=bool(more))
            if more:
                raise self._wrong_size(self._offset + 1)
        actual = f"{self._blob.digest.algorithm}:{self._hash.hexdigest()}"
        if actual != self._blob.digest:
            for session in self._used:
                self._distrust(session)
            what = f"{self._session.reference}: blob"
            raise DigestMismatch(what, self._blob.digest, actual, self._session.host)

    def _wrong_size(self, actual: int) -> SizeMismatch:
        what = f"{self._session.reference}: blob {self._blob.digest}"
        return SizeMismatch(what, self._blob.size, actual, self._session.host)

    # -- connections ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Request the missing bytes. Afterwards `_body` is set, or another attempt is due."""
        session = self._session
        self._connections += 1
        headers = {"Range": f"bytes={self._offset}-"} if self._offset and self._knows_ranges else {}
        try:
            response = session.get(f"blobs/{self._blob.digest}", headers, self._cancellation)
        except GuestpullError as error:
            self._cancellation.check()
            self._give_up(error)
            return
        self._body = Body(response, self._cancellation, self._limits)
        self._connected_at = self._offset
        match response.status:
            case HTTPStatus.NOT_FOUND:
                self._give_up(BlobNotFound(session.reference, self._blob.digest, session.host))
            case HTTPStatus.OK:
                self._skip = self._offset
                self._check_length(response, self._blob.size)
            case HTTPStatus.PARTIAL_CONTENT if headers and (start := self._start_of(response)) is not None:
                self._skip = self._offset - start
                self._check_length(response, self._blob.size - start)
            case status:
                self._knows_ranges = False
                self._failed(f"status {status} with the wrong part of a blob")
        if self._body is not None and session not in self._used:
            self._used.append(session)

    def _start_of(self, response: urllib3.BaseHTTPResponse) -> int | None:
        """Return where a partial response starts; None if it cannot be used."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return int(match[1]) if match is not None and int(match[1]) <= self._offset else None

    def _check_length(self, response: urllib3.BaseHTTPResponse, expected: int) -> None:
        value = response.headers.get("Content-Length", "")
        if value.isdecimal() and len(value) < 20 and int(value) != expected:
            self._give_up(self._wrong_size(self._blob.size - expected + int(value)))

    def _receive(self, body: Body, limit: int) -> bytes:
        """Return bytes of the response; empty if the connection failed and another attempt is due."""
        try:
            piece = body.read(limit)
        except TransportError as error:
            self._failed(plain(error))
            return b""
        self.received_bytes += len(piece)
        if not piece and self._offset < self._blob.size:
            self._failed("connection broken in the middle of a blob")
        return piece

    def _failed(self, problem: str) -> None:
        """Close the connection; then wait before the next attempt, or give up after too many."""
        received = self._offset - self._connected_at
        self._failures = 1 if received >= _PROGRESS else self._failures + 1
        self._disconnect(broken=True)
        if self._failures >= self._session.max_attempts or self._connections >= _MAX_CONNECTIONS:
            session = self._session
            self._give_up(RegistryUnavailable(session.reference, session.host, problem, self._connections))
        else:
            self._session.backoff(self._failures, self._cancellation)

    def _give_up(self, error: GuestpullError) -> None:
        """Continue at the next endpoint; raise the error if there is none."""
        self._disconnect(broken=True)
        if not self._others:
            raise error
        self._session = self._others.pop(0)
        self._failures = 0
        self._knows_ranges = True

    def _disconnect(self, *, broken: bool) -> None:
        if self._body is not None:
            self._body.close(broken=broken)
        self._body = None
        self._skip = 0
