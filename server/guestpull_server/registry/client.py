"""The distribution client: a reference -> an image's manifest and config -> its blobs.

    source = client.image(Reference.parse("busybox"), credentials)
    resolved = source.resolve(platform, cancellation, stored)     # one or two small exchanges
    with source.open_blob(resolved.layers[0].blob, cancellation) as stream:
        ...

Follows the OCI distribution specification, "Pull". Manifests are fetched by GET, never believed by HEAD: what
is kept is checked against its digest, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final, Protocol, Self

from guestpull_server.config import Configuration, Limits
from guestpull_server.errors import (
    BlobNotFound,
    DigestMismatch,
    GuestpullError,
    ImageNotFound,
    InvalidManifest,
    LimitExceeded,
    RegistryUnavailable,
    SizeMismatch,
)
from guestpull_server.models import (
    Cancellation,
    Credentials,
    Descriptor,
    Digest,
    Platform,
    ResolvedImage,
)
from guestpull_server.registry.authentication import Authorization, Tokens
from guestpull_server.registry.blobs import BlobStream, RegistryBlob
from guestpull_server.registry.credentials import CredentialsFile
from guestpull_server.registry.endpoints import Endpoints
from guestpull_server.registry.manifests import (
    ACCEPTED,
    Document,
    ImageIndex,
    ImageManifest,
    check_platform,
    choose,
    pair_layers,
    read,
    read_config,
)
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.session import Session, TooLong
from guestpull_server.registry.transport import Transport

_MAX_INDEX_DEPTH: Final = 4  # an index of indexes is rare; deeper ones are a loop or a joke


class ImageSource(Protocol):
    """Where one image comes from: a registry, or a local file."""

    @property
    def reference(self) -> str:
        """The name that the image is to be stored under; empty if its source does not say."""

    def resolve(
        self,
        platform: Platform,
        cancellation: Cancellation,
        stored: Callable[[Digest], ResolvedImage | None],
    ) -> ResolvedImage:
        """Find the image for a platform.

        Args:
            platform: that the image must run on.
            cancellation: of the caller.
            stored: is asked with the manifest's digest, before anything more is fetched: who knows the
                image already says what it is.

        Raises:
            GuestpullError: there is none, or it cannot be had, read, or run.
        """

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        """The bytes of one of its blobs. Thread-safe: blobs may be read side by side."""


class RegistryClient:
    """Access to all registries, by the configuration. Thread-safe; keep one.

    Raises:
        InvalidConfiguration: the configuration names files or settings that cannot be used.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._limits = configuration.limits
        self._transport = Transport(configuration)
        self._endpoints = Endpoints(configuration)
        self._credentials = CredentialsFile(configuration)
        self._tokens = Tokens()

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()

    def image(self, reference: Reference, credentials: Credentials | None) -> ImageSource:
        """An image as one caller sees it.

        Args:
            reference: its name.
            credentials: the caller's; without any, those of the configured credentials file count.

        Raises:
            RegistryBlocked: the configuration blocks the registry.
        """
        credentials = credentials or self._credentials.find(reference)
        sessions = tuple(
            Session(
                str(reference),
                endpoint,
                Authorization(str(reference), endpoint, credentials, self._tokens),
                self._transport,
                self._limits,
            )
            for endpoint in self._endpoints.of(reference)
        )
        return _RegistryImage(reference, sessions, self._limits)


class _RegistryImage:
    """An ImageSource by the distribution API. Mirrors are asked first; the last session is the registry's own."""

    def __init__(self, reference: Reference, sessions: tuple[Session, ...], limits: Limits) -> None:
        self._reference = reference
        self._sessions = sessions
        self._limits = limits

    @property
    def reference(self) -> str:
        return str(self._reference)

    def resolve(
        self,
        platform: Platform,
        cancellation: Cancellation,
        stored: Callable[[Digest], ResolvedImage | None],
    ) -> ResolvedImage:
        *mirrors, registry = self._sessions
        for mirror in mirrors:
            try:
                return self._resolve(mirror, platform, cancellation, stored)
            except GuestpullError:
                # whatever ails a mirror, the registry has the last word; but not if nobody waits for it
                cancellation.check()
        return self._resolve(registry, platform, cancellation, stored)

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        streams = [RegistryBlob(session, blob, cancellation, self._limits) for session in self._sessions]
        return streams[0] if len(streams) == 1 else _FirstThatWorks(streams, cancellation)

    # -- manifests ------------------------------------------------------------------------------------------

    def _resolve(
        self,
        session: Session,
        platform: Platform,
        cancellation: Cancellation,
        stored: Callable[[Digest], ResolvedImage | None],
    ) -> ResolvedImage:
        name = self.reference
        target: str = self._reference.target
        known = stored(self._reference.digest) if self._reference.digest is not None else None
        for _ in range(_MAX_INDEX_DEPTH):
            if known is not None:
                return self._known(known, platform)
            document = self._document(session, target, cancellation)
            known = stored(document.digest)
            if known is not None:
                continue
            found = read(document, self._limits.max_layers)
            match found:
                case ImageManifest():
                    return self._image(session, document.digest, found, platform, cancellation)
                case ImageIndex():
                    target = choose(name, found, platform).digest
                    known = stored(Digest(target))
        if known is not None:
            return self._known(known, platform)
        problem = f"its indexes are nested more than {_MAX_INDEX_DEPTH} deep"
        raise InvalidManifest(name, target, problem)

    def _known(self, known: ResolvedImage, platform: Platform) -> ResolvedImage:
        config = read_config(self.reference, known.image_id, known.config)
        check_platform(self.reference, config.platform, platform)
        return known

    def _document(self, session: Session, target: str, cancellation: Cancellation) -> Document:
        """A manifest or an index, checked against the digest that it was asked for by."""
        name = self.reference
        try:
            response, content = session.document(
                f"manifests/{target}", {"Accept": ACCEPTED}, self._limits.max_manifest_bytes, cancellation
            )
        except TooLong:
            raise LimitExceeded(
                f"{name}: the manifest", "max_manifest_bytes", self._limits.max_manifest_bytes
            ) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise ImageNotFound(name, session.host, f"404 for {target}")
        if response.status != HTTPStatus.OK:
            raise RegistryUnavailable(name, session.host, f"it answers {response.status} to GET manifests", 1)
        wanted = target if ":" in target else response.headers.get("Docker-Content-Digest", "")
        digest = self._checked("manifest", wanted, content, session)
        return Document(name, digest, content, response.headers.get("Content-Type", ""))

    def _checked(self, what: str, wanted: str, content: bytes, session: Session) -> Digest:
        if not wanted:
            return Digest.of(content)
        digest = Digest(wanted)
        if not digest.matches(content):
            hasher = digest.hasher()
            hasher.update(content)
            actual = f"{digest.algorithm}:{hasher.hexdigest()}"
            raise DigestMismatch(f"{self.reference}: {what}", digest, actual, session.host)
        return digest

    def _image(
        self,
        session: Session,
        digest: Digest,
        manifest: ImageManifest,
        platform: Platform,
        cancellation: Cancellation,
    ) -> ResolvedImage:
        content = self._config(session, manifest.config, cancellation)
        config = read_config(self.reference, manifest.config.digest, content)
        check_platform(self.reference, config.platform, platform)
        layers = pair_layers(self.reference, digest, manifest, config)
        return ResolvedImage(self.reference, digest, manifest.config.digest, content, layers)

    def _config(self, session: Session, blob: Descriptor, cancellation: Cancellation) -> bytes:
        name = f"{self.reference}: the image config"
        if blob.size > self._limits.max_config_bytes:
            raise LimitExceeded(name, "max_config_bytes", self._limits.max_config_bytes)
        try:
            response, content = session.document(
                f"blobs/{blob.digest}", {}, min(blob.size, self._limits.max_config_bytes), cancellation
            )
        except TooLong:
            raise SizeMismatch(name, blob.size, blob.size + 1, session.host) from None
        if response.status == HTTPStatus.NOT_FOUND:
            raise BlobNotFound(self.reference, blob.digest, session.host)
        if len(content) != blob.size:
            raise SizeMismatch(name, blob.size, len(content), session.host)
        self._checked("image config", blob.digest, content, session)
        return content


class _FirstThatWorks:
    """A BlobStream that goes on to the next endpoint as long as none of its bytes were handed on."""

    def __init__(self, streams: list[RegistryBlob], cancellation: Cancellation) -> None:
        self._streams = streams
        self._cancellation = cancellation
        self._handed_on = False

    @property
    def received_bytes(self) -> int:
        return sum(stream.received_bytes for stream in self._streams)

    def read(self, limit: int) -> bytes:
        while True:
            try:
                piece = self._streams[0].read(limit)
            except GuestpullError:
                self._cancellation.check()
                if self._handed_on or len(self._streams) == 1:
                    raise
                self._streams.pop(0).__exit__(None, None, None)
                continue
            self._handed_on = True
            return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for stream in self._streams:
            stream.__exit__(None, None, None)
