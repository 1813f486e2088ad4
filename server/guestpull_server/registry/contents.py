"""Manifests and configs: the small documents that are read whole, wherever they come from, and verified.

Manifests are fetched by GET, never believed by HEAD: what is kept is checked against its digest, byte by byte. The
digest of a tag is that of the bytes that came.
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


class Contents(Protocol):
    """Where manifests and configs come from. What it gives has the digest that it was asked for by."""

    def manifest(self, target: str) -> Document:
        """A manifest or an index, by its tag or its digest.

        Raises:
            ImageNotFound: there is none.
            GuestpullError: it cannot be had, or is not what it should be.
        """

    def config(self, blob: Descriptor) -> bytes:
        """An image config.

        Raises:
            BlobNotFound: there is none.
            GuestpullError: it cannot be had, or is not what it should be.
        """


class RegistryContents:
    """Contents of one repository at one endpoint."""

    def __init__(self, name: str, session: Session, limits: Limits, cancellation: Cancellation) -> None:
        self._name = name
        self._session = session
        self._limits = limits
        self._cancellation = cancellation

    def manifest(self, target: str) -> Document:
        """See Contents."""
        return _twice(lambda: self._manifest(target))

    def config(self, blob: Descriptor) -> bytes:
        """See Contents."""
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
            raise RegistryUnavailable(name, session.host, f"it answers {response.status} to GET manifests", 1)
        media_type = response.headers.get("Content-Type", "")
        if media_type.startswith("text/html") and not content.lstrip().startswith(b"{"):
            # a web site that is no registry, or a proxy that wants somebody to log in
            problem = "it answers GET manifests with a web page"
            raise RegistryUnavailable(name, session.host, problem, 1)
        if ":" in target:
            digest = Digest(target)
            check_digest(f"{name}: manifest", digest, content, session.host)
        else:
            digest = Digest.of(content)
            said = response.headers.get("Docker-Content-Digest")
            if said is not None:
                check_digest(f"{name}: manifest", self._digest_of(said), content, session.host)
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

    def _digest_of(self, said: str) -> Digest:
        try:
            return Digest(said)
        except InvalidDigest:
            problem = f"its Docker-Content-Digest is {said[:200]!r}"
            raise RegistryUnavailable(self._name, self._session.host, problem, 1) from None


def check_digest(what: str, wanted: Digest, content: bytes, source: str) -> None:
    """Do nothing if some bytes have their digest.

    Raises:
        DigestMismatch: they do not.
    """
    if not wanted.matches(content):
        hasher = wanted.hasher()
        hasher.update(content)
        raise DigestMismatch(what, wanted, f"{wanted.algorithm}:{hasher.hexdigest()}", source)


def too_long(name: str, what: str, limits: Limits) -> LimitExceeded:
    """The error for a `manifest` or a `config` that is longer than the limits allow."""
    limit = f"max_{what}_bytes"
    allowed = {"manifest": limits.max_manifest_bytes, "config": limits.max_config_bytes}[what]
    return LimitExceeded(f"{name}: the {what}", limit, allowed)


def _twice(fetch: Callable[[], _T]) -> _T:
    """A proxy or a bad line may have altered it once; twice is the registry's last word."""
    try:
        return fetch()
    except (DigestMismatch, SizeMismatch):
        return fetch()
