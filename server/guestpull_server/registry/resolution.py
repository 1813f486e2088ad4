"""From a reference to an image: manifest or index, the choice of a platform, the config.

Manifests are fetched by GET, never believed by HEAD: what is kept is checked against its digest, byte by byte. The
digest of a tag is that of the bytes that came.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final, TypeVar

from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    DigestMismatch,
    ImageNotFound,
    InvalidDigest,
    InvalidManifest,
    LimitExceeded,
    NoMatchingPlatform,
    RegistryUnavailable,
    SizeMismatch,
    UnsupportedImage,
)
from guestpull_server.models import Cancellation, Descriptor, Digest, Platform, ResolvedImage
from guestpull_server.registry.manifests import (
    ACCEPTED,
    Document,
    ImageIndex,
    ImageManifest,
    candidates,
    check_platform,
    pair_layers,
    read,
    read_config,
)
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.session import Session, TooLong
from guestpull_server.registry.source import Stored

_MAX_INDEX_DEPTH: Final = 4  # an index of indexes is rare; deeper ones are a loop or a joke
_MAX_DOCUMENTS: Final = 32  # manifests and indexes that one resolution may look at

_T = TypeVar("_T")


class Resolution:
    """One reference at one endpoint, on its way through indexes to the image for a platform."""

    def __init__(
        self,
        reference: Reference,
        session: Session,
        platform: Platform,
        cancellation: Cancellation,
        stored: Stored,
        limits: Limits,
    ) -> None:
        self._target = reference.target
        self._name = str(reference)
        self._session = session
        self._platform = platform
        self._cancellation = cancellation
        self._stored = stored
        self._limits = limits
        self._documents = 0

    def run(self) -> ResolvedImage:
        """Resolve.

        Raises:
            GuestpullError: what ImageSource.resolve says.
        """
        return self._resolve(self._target, depth=0)

    def _resolve(self, target: str, depth: int) -> ResolvedImage:
        known = self._known(Digest(target)) if ":" in target else None
        if known is not None:
            return known
        document = self._twice(lambda: self._document(target))
        known = self._known(document.digest) if ":" not in target else None
        if known is not None:
            return known
        found = read(document, self._limits.max_layers)
        match found:
            case ImageManifest():
                return self._image(document.digest, found)
            case ImageIndex():
                return self._choice(document, found, depth)

    def _choice(self, document: Document, index: ImageIndex, depth: int) -> ResolvedImage:
        *others, last = candidates(self._name, index, self._platform)
        if depth >= _MAX_INDEX_DEPTH or self._documents + len(others) > _MAX_DOCUMENTS:
            raise InvalidManifest(self._name, document.digest, "its indexes are nested too deep, or too many")
        for candidate in others:
            try:
                return self._resolve(candidate.digest, depth + 1)
            except (NoMatchingPlatform, UnsupportedImage):
                continue
        return self._resolve(last.digest, depth + 1)

    def _known(self, digest: Digest) -> ResolvedImage | None:
        known = self._stored(digest)
        if known is not None:
            config = read_config(self._name, known.image_id, known.config)
            check_platform(self._name, config.platform, self._platform)
        return known

    def _document(self, target: str) -> Document:
        """A manifest or an index, checked against the digest that it was asked for by."""
        session, limit = self._session, self._limits.max_manifest_bytes
        self._documents += 1
        try:
            response, content = session.document(
                f"manifests/{target}", {"Accept": ACCEPTED}, limit, self._cancellation
            )
        except TooLong:
            raise LimitExceeded(f"{self._name}: the manifest", "max_manifest_bytes", limit) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise ImageNotFound(self._name, session.host, f"404 for {target}")
        if response.status != HTTPStatus.OK:
            raise RegistryUnavailable(
                self._name, session.host, f"it answers {response.status} to GET manifests", 1
            )
        if ":" in target:
            digest = Digest(target)
            self._check("manifest", digest, content)
        else:
            digest = Digest.of(content)
            said = response.headers.get("Docker-Content-Digest")
            if said is not None:
                self._check("manifest", self._digest_of(said), content)
        return Document(self._name, digest, content, response.headers.get("Content-Type", ""))

    def _image(self, digest: Digest, manifest: ImageManifest) -> ResolvedImage:
        content = self._twice(lambda: self._config(manifest.config))
        config = read_config(self._name, manifest.config.digest, content)
        check_platform(self._name, config.platform, self._platform)
        layers = pair_layers(self._name, digest, manifest, config)
        return ResolvedImage(self._name, digest, manifest.config.digest, content, layers)

    def _config(self, blob: Descriptor) -> bytes:
        name = f"{self._name}: the image config"
        session, limit = self._session, self._limits.max_config_bytes
        if blob.size > limit:
            raise LimitExceeded(name, "max_config_bytes", limit)
        try:
            response, content = session.document(f"blobs/{blob.digest}", {}, blob.size, self._cancellation)
        except TooLong:
            raise SizeMismatch(name, blob.size, blob.size + 1, session.host) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise BlobNotFound(self._name, blob.digest, session.host)
        if len(content) != blob.size:
            raise SizeMismatch(name, blob.size, len(content), session.host)
        self._check("image config", blob.digest, content)
        return content

    def _digest_of(self, said: str) -> Digest:
        try:
            return Digest(said)
        except InvalidDigest:
            problem = f"its Docker-Content-Digest is {said[:200]!r}"
            raise RegistryUnavailable(self._name, self._session.host, problem, 1) from None

    def _check(self, what: str, wanted: Digest, content: bytes) -> None:
        if not wanted.matches(content):
            hasher = wanted.hasher()
            hasher.update(content)
            actual = f"{wanted.algorithm}:{hasher.hexdigest()}"
            raise DigestMismatch(f"{self._name}: {what}", wanted, actual, self._session.host)

    @staticmethod
    def _twice(fetch: Callable[[], _T]) -> _T:
        """A proxy or a bad line may have altered it once; twice is the registry's last word."""
        try:
            return fetch()
        except (DigestMismatch, SizeMismatch):
            return fetch()
