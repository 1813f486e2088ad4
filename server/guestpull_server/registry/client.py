"""The distribution client: reads manifests, configs and blobs from registries and mirrors.

    source = client.image(Reference.parse("busybox"), credentials)
    image = source.image(source.manifest(platform, cancellation), cancellation)
    with source.open_blob(image.layers[0].blob, cancellation) as stream:
        ...

Follows "Pull" of the OCI distribution specification.
"""

from __future__ import annotations

import functools

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, Limits
from guestpull_server.errors import GuestpullError
from guestpull_server.models import Credentials, Descriptor, Digest, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry.authentication import Authorization, Tokens
from guestpull_server.registry.blobs import RegistryBlob
from guestpull_server.registry.credentials import CredentialsFile
from guestpull_server.registry.documents import RegistryDocuments
from guestpull_server.registry.endpoints import Endpoint, Endpoints
from guestpull_server.registry.image_source import BlobStream, ImageSource, ResolvedManifest
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.resolution import Resolution
from guestpull_server.registry.session import Session
from guestpull_server.registry.transport import Transport


class RegistryClient:
    """Access to all registries. Thread-safe; create one and keep it.

    Raises:
        InvalidConfiguration: a file or setting of the configuration cannot be used.
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
        """Return the source of an image, with the access rights of one caller.

        Args:
            reference: the image.
            credentials: the caller's, sent to the registry only. Mirrors, and the registry if the caller has no
                credentials, get those of the configured credentials file.

        Raises:
            RegistryBlocked: the configuration blocks the registry.
        """
        name = str(reference)
        sessions: list[Session] = []
        for endpoint in self._endpoints.of(reference):
            known = None if endpoint.is_mirror else credentials
            find = functools.partial(self._find_credentials, endpoint, known)
            authorization = Authorization(name, endpoint, find, self._tokens)
            sessions.append(Session(name, endpoint, authorization, self._transport, self._limits))
        return _RegistryImage(reference, tuple(sessions), self._limits)

    def _find_credentials(self, endpoint: Endpoint, known: Credentials | None) -> Credentials | None:
        return known or self._credentials.find(endpoint)


class _RegistryImage:
    """An ImageSource over the distribution API. Mirrors come first; the last session is the registry's."""

    def __init__(self, reference: Reference, sessions: tuple[Session, ...], limits: Limits) -> None:
        self._reference = reference
        *self._mirrors, self._registry = sessions
        self._limits = limits
        self._distrusted: set[tuple[str, Digest]] = set()

    @property
    def reference(self) -> str:
        return str(self._reference)

    @property
    def registry(self) -> str:
        return self._reference.host.lower()

    def manifest(self, platform: Platform, cancellation: Cancellation) -> ResolvedManifest:
        while self._mirrors:
            try:
                return self._resolution(platform, cancellation).manifest(self._reference.target)
            except GuestpullError:
                self._drop_mirror(cancellation)
        return self._resolution(platform, cancellation).manifest(self._reference.target)

    def image(self, manifest: ResolvedManifest, cancellation: Cancellation) -> ResolvedImage:
        while self._mirrors:
            try:
                return self._resolution(manifest.platform, cancellation).image(manifest)
            except GuestpullError:
                self._drop_mirror(cancellation)
                manifest = self.manifest(manifest.platform, cancellation)  # tags can differ between mirrors
        return self._resolution(manifest.platform, cancellation).image(manifest)

    def _drop_mirror(self, cancellation: Cancellation) -> None:
        """Stop using the first mirror, for blobs as well, unless the request was cancelled."""
        cancellation.check()
        del self._mirrors[0]

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        trusted = [one for one in self._mirrors if (one.endpoint.name, blob.digest) not in self._distrusted]

        def distrust(session: Session) -> None:
            self._distrusted.add((session.endpoint.name, blob.digest))

        return RegistryBlob((*trusted, self._registry), blob, cancellation, self._limits, distrust)

    def _resolution(self, platform: Platform, cancellation: Cancellation) -> Resolution:
        """Resolve at the first mirror, or at the registry if no mirror is left."""
        name, session = self.reference, next(iter(self._mirrors), self._registry)
        documents = RegistryDocuments(name, session, self._limits, cancellation)
        return Resolution(name, name, documents, platform, self._limits)
