"""One blob, streamed: verified as it comes, and resumed where it broke off.

Bytes that were handed on are never asked for again: a broken or stalled connection is followed by a request for
the rest (Range); where a registry ignores that, or answers something else, what is known already is skipped.
Where one endpoint fails for good, the next goes on at the same place: the digest decides in the end.
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
"""A connection that brought less than this counts as a failed attempt; others start the count again."""
_MAX_CONNECTIONS: Final = 1000
_MAX_PIECE: Final = 1024 * KiB


def _have_malloc_keep_pages() -> None:
    """Free one big block, which makes glibc's malloc keep the pages of those that are not bigger.

    Otherwise it maps, and the kernel clears, fresh pages for each piece: 1.4 s of CPU time a GiB instead of 0.7.
    """
    bytes(_MAX_PIECE + 64 * KiB)


_have_malloc_keep_pages()


class RegistryBlob:
    """A BlobStream from a registry, or its mirrors.

    Args:
        sessions: the endpoints that have it, in the order in which they are to be used; one or more.
        blob: its digest and size are what the bytes must have.
        cancellation: of whoever reads it.
        limits: how patient to be.
        distrust: told of every endpoint that had a part in bytes that turned out to be wrong.
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
        self._fruitless = 0
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
            # a registry that did not say how long the blob is may have more
            unsaid = self._body.response.headers.get("Content-Length") is None
            try:
                more = self._body.read(1) if unsaid else b""
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
        """Ask for what is missing; afterwards there is a body, or another attempt is to be made."""
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
                self._failed(f"it answers {status} with another part of a blob than the one asked for")
        if self._body is not None and session not in self._used:
            self._used.append(session)

    def _start_of(self, response: urllib3.BaseHTTPResponse) -> int | None:
        """Where a partial response starts; None if it is of no use."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return int(match[1]) if match is not None and int(match[1]) <= self._offset else None

    def _check_length(self, response: urllib3.BaseHTTPResponse, expected: int) -> None:
        value = response.headers.get("Content-Length", "")
        if value.isdecimal() and len(value) < 20 and int(value) != expected:
            self._give_up(self._wrong_size(self._blob.size - expected + int(value)))

    def _receive(self, body: Body, limit: int) -> bytes:
        """Bytes of the response; none where the connection failed, and another attempt is to be made."""
        try:
            piece = body.read(limit)
        except TransportError as error:
            self._failed(plain(error))
            return b""
        self.received_bytes += len(piece)
        if not piece and self._offset < self._blob.size:
            self._failed("the connection broke off in the middle of a blob")
        return piece

    def _failed(self, problem: str) -> None:
        """Let this connection go; wait before the next, or give up where there was no good in the last ones."""
        brought = self._offset - self._connected_at
        self._fruitless = 1 if brought >= _PROGRESS else self._fruitless + 1
        self._disconnect(broken=True)
        if self._fruitless >= self._session.max_attempts or self._connections >= _MAX_CONNECTIONS:
            session = self._session
            self._give_up(RegistryUnavailable(session.reference, session.host, problem, self._connections))
        else:
            self._session.backoff(self._fruitless, self._cancellation)

    def _give_up(self, error: GuestpullError) -> None:
        """Go on to the next endpoint, or raise the error where this was the last."""
        self._disconnect(broken=True)
        if not self._others:
            raise error
        self._session = self._others.pop(0)
        self._fruitless = 0
        self._knows_ranges = True

    def _disconnect(self, *, broken: bool) -> None:
        if self._body is not None:
            self._body.close(broken=broken)
        self._body = None
        self._skip = 0
