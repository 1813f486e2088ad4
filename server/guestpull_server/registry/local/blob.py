"""Blobs and documents of local images."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import (
    DigestMismatch,
    InvalidManifest,
    LimitExceeded,
    SizeMismatch,
    storage_errors,
)
from guestpull_server.models import Descriptor, MiB
from guestpull_server.registry.local.tree import Files, Part

_MAX_PIECE: Final = 1 * MiB


class LocalBlob:
    """A BlobStream from a file.

    Args:
        name: the image, as errors name it.
        part: the bytes.
        blob: the expected digest and size.
        cancellation: of the request.
    """

    def __init__(self, name: str, part: Part, blob: Descriptor, cancellation: Cancellation) -> None:
        self.received_bytes = 0
        self._name = name
        self._part = part
        self._blob = blob
        self._cancellation = cancellation
        self._hash = blob.digest.hasher()

    def read(self, limit: int) -> bytes:
        """See BlobStream."""
        self._cancellation.check()
        if self._part.size != self._blob.size:
            raise self._wrong_size(self._part.size)
        with storage_errors(f"reading {self._name}", self._blob.digest):
            piece = self._part.read_at(self.received_bytes, min(limit, _MAX_PIECE))
        self.received_bytes += len(piece)
        self._hash.update(piece)
        if not piece:
            self._finish()
        return piece

    def _finish(self) -> None:
        if self.received_bytes != self._blob.size:  # the file was truncated meanwhile
            raise self._wrong_size(self.received_bytes)
        actual = f"{self._blob.digest.algorithm}:{self._hash.hexdigest()}"
        if actual != self._blob.digest:
            raise DigestMismatch(f"{self._name}: blob", self._blob.digest, actual, "the file")

    def _wrong_size(self, actual: int) -> SizeMismatch:
        return SizeMismatch(f"{self._name}: blob {self._blob.digest}", self._blob.size, actual, "the file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._part.close()


def read_document(name: str, files: Files, path: str, limit: int, limit_name: str) -> bytes:
    """Read a whole file.

    Raises:
        InvalidManifest: the file does not exist.
        LimitExceeded: the file is longer than `limit` bytes.
    """
    content = read_if_there(name, files, path, limit, limit_name)
    if content is None:
        raise InvalidManifest(name, path, "file not found")
    return content


def read_if_there(name: str, files: Files, path: str, limit: int, limit_name: str) -> bytes | None:
    """Like read_document, but return None if the file does not exist."""
    part = files.find(path)
    if part is None:
        return None
    with part, storage_errors(f"reading {name}", path):
        if part.size > limit:
            raise LimitExceeded(f"{name}: {path}", limit_name, limit)
        return part.read_at(0, limit)
