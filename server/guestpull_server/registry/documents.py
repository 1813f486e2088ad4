"""Manifests and configs, fetched whole and verified.

Manifests are fetched with GET, not HEAD, because their bytes are verified. The digest of a tag is that of the
received bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol, TypeVar

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    DigestMismatch,
    ImageNotFound,
    InvalidDigest,
    LimitExceeded,
    RegistryUnavailable,
    SizeMismatch,
)
from guestpull_server.models import Descriptor, Digest
from guestpull_server.registry.manifests import ACCEPTED, Document
from guestpull_server.registry.session import Session, TooLong

_T = TypeVar("_T")


class Documents(Protocol):
    """Access to manifests and configs. What is returned has the requested digest."""

    def manifest(self, target: str) -> Document:
        """Return a manifest or index by its tag or digest.

        Raises:
            ImageNotFound: it does not exist.
            GuestpullError: it cannot be read, or does not have its digest.
        """

    def config(self, blob: Descriptor) -> bytes:
        """Return an image config.

        Raises:
            BlobNotFound: it does not exist.
            GuestpullError: it cannot be read, or does not have its digest.
        """


class RegistryDocuments:
    """The documents of one repository at one endpoint."""

    def __init__(self, name: str, session: Session, limits: Limits, cancellation: Cancellation) -> None:
        self._name = name
        self._session = session
        self._limits = limits
        self._cancellation = cancellation

    def manifest(self, target: str) -> Document:
        """See Documents."""
        return _twice(lambda: self._manifest(target))

    def config(self, blob: Descriptor) -> bytes:
        """See Documents."""
        if blob.size > self._limits.max_config_bytes:
            raise too_long(self._name, "config", self._limits)
        return _twice(lambda: self._config(blob))

    def _manifest(self, target: str) -> Document:
        name, session = self._name, self._session
        try:
            response, content = session.document(
                f"manifests/{target}",
                {"Accept": ACCEPTED},
                self._limits.max_manifest_bytes,
                self._cancellation,
            )
        except TooLong:
            raise too_long(name, "manifest", self._limits) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise ImageNotFound(name, session.host, f"404 for {target}")
        if response.status != HTTPStatus.OK:
            raise RegistryUnavailable(name, session.host, f"status {response.status} for GET manifests", 1)
        media_type = response.headers.get("Content-Type", "")
        if media_type.startswith("text/html") and not content.lstrip().startswith(b"{"):
            # the host is not a registry, or a proxy shows its login page
            problem = "a web page instead of a manifest"
            raise RegistryUnavailable(name, session.host, problem, 1)
        if ":" in target:
            digest = Digest(target)
            check_digest(f"{name}: manifest", digest, content, session.host)
        else:
            digest = Digest.of(content)
            header = response.headers.get("Docker-Content-Digest")
            if header is not None:
                check_digest(f"{name}: manifest", self._digest_of(header), content, session.host)
        return Document(name, digest, content, media_type)

    def _config(self, blob: Descriptor) -> bytes:
        name, session = f"{self._name}: image config", self._session
        try:
            response, content = session.document(f"blobs/{blob.digest}", {}, blob.size, self._cancellation)
        except TooLong:
            raise SizeMismatch(name, blob.size, blob.size + 1, session.host) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise BlobNotFound(self._name, blob.digest, session.host)
        if len(content) != blob.size:
            raise SizeMismatch(name, blob.size, len(content), session.host)
        check_digest(name, blob.digest, content, session.host)
        return content

    def _digest_of(self, header: str) -> Digest:
        try:
            return Digest(header)
        except InvalidDigest:
            problem = f"invalid Docker-Content-Digest {header[:200]!r}"
            raise RegistryUnavailable(self._name, self._session.host, problem, 1) from None


def check_digest(what: str, expected: Digest, content: bytes, source: str) -> None:
    """Verify the digest of some bytes.

    Raises:
        DigestMismatch: the bytes have another digest.
    """
    if not expected.matches(content):
        hasher = expected.hasher()
        hasher.update(content)
        raise DigestMismatch(what, expected, f"{expected.algorithm}:{hasher.hexdigest()}", source)


def too_long(name: str, what: str, limits: Limits) -> LimitExceeded:
    """Return the error for a `manifest` or `config` that exceeds its limit."""
    limit = f"max_{what}_bytes"
    allowed = {"manifest": limits.max_manifest_bytes, "config": limits.max_config_bytes}[what]
    return LimitExceeded(f"{name}: the {what}", limit, allowed)


def _twice(fetch: Callable[[], _T]) -> _T:
    """Fetch again after a mismatch, because a proxy or a bad line can corrupt a single response."""
    try:
        return fetch()
    except (DigestMismatch, SizeMismatch):
        return fetch()
