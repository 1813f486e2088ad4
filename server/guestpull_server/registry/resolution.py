"""Resolves a reference: manifest or index, choice of a platform, config."""

from __future__ import annotations

import dataclasses
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.errors import InvalidManifest, NoMatchingPlatform, UnsupportedImage
from guestpull_server.models import Digest, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry.documents import Documents
from guestpull_server.registry.image_source import ResolvedManifest
from guestpull_server.registry.manifests import (
    Document,
    ImageIndex,
    ImageManifest,
    candidates,
    check_platform,
    pair_layers,
    read,
    read_config,
)

_MAX_INDEX_DEPTH: Final = 4  # nested indexes are rare; deeper nesting is a loop or hostile
_MAX_READS: Final = 32  # manifests and indexes that one resolution reads


class Resolution:
    """The steps of ImageSource, on any Documents.

    Args:
        name: the image, as errors name it.
        reference: the name to store the image under.
        documents: where manifests and configs come from.
        platform: the platform that the image must run on.
        limits: bounds on what is read.
    """

    def __init__(
        self, name: str, reference: str, documents: Documents, platform: Platform, limits: Limits
    ) -> None:
        self._name = name
        self._reference = reference
        self._documents = documents
        self._platform = platform
        self._limits = limits
        self._reads = 0

    def manifest(self, target: str) -> ResolvedManifest:
        """Resolve a tag or a digest; see ImageSource.manifest. A digest needs no request."""
        if ":" in target:
            return ResolvedManifest(Digest(target), self._platform)
        self._reads += 1
        document = self._documents.manifest(target)
        match read(document, self._limits.max_layers):
            case ImageManifest():
                return ResolvedManifest(document.digest, self._platform, document)
            case ImageIndex() as index:
                return dataclasses.replace(self.choose(document.digest, index), index=document.content)

    def choose(self, digest: str, index: ImageIndex, depth: int = 0) -> ResolvedManifest:
        """Choose the manifest for the platform from an index, which errors call `digest`."""
        *others, last = candidates(self._name, index, self._platform)
        if depth >= _MAX_INDEX_DEPTH or self._reads + len(others) > _MAX_READS:
            raise InvalidManifest(self._name, digest, "too many indexes, or nested too deeply")
        for candidate in others:
            try:
                image = self._image(candidate.digest, depth + 1)
            except (NoMatchingPlatform, UnsupportedImage):
                continue
            return ResolvedManifest(image.manifest_digest, self._platform, image=image)
        return ResolvedManifest(last.digest, self._platform)

    def image(self, manifest: ResolvedManifest) -> ResolvedImage:
        """Read an image; see ImageSource.image."""
        depth = 1 if manifest.index else 0
        image = manifest.image or self._image(manifest.digest, depth, manifest.document)
        return dataclasses.replace(image, index=manifest.index or image.index)

    def _image(self, digest: Digest, depth: int = 0, document: Document | None = None) -> ResolvedImage:
        self._reads += 1
        document = document or self._documents.manifest(digest)
        match read(document, self._limits.max_layers):
            case ImageManifest() as manifest:
                return self._with_config(document, manifest)
            case ImageIndex() as index:
                chosen = self.choose(digest, index, depth)
                image = chosen.image or self._image(chosen.digest, depth + 1)
                return dataclasses.replace(image, index=document.content)

    def _with_config(self, document: Document, manifest: ImageManifest) -> ResolvedImage:
        image_id, digest = manifest.config.digest, document.digest
        content = self._documents.config(manifest.config)
        config = read_config(self._name, image_id, content)
        check_platform(self._name, config.platform, self._platform)
        layers = pair_layers(self._name, digest, manifest, config)
        return ResolvedImage(self._reference, digest, image_id, content, layers, manifest=document.content)
