"""From a reference to an image: manifest or index, the choice of a platform, the config."""

from __future__ import annotations

import dataclasses
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.errors import InvalidManifest, NoMatchingPlatform, UnsupportedImage
from guestpull_server.models import Digest, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry.contents import Contents
from guestpull_server.registry.manifests import (
    ImageIndex,
    ImageManifest,
    candidates,
    check_platform,
    pair_layers,
    read,
    read_config,
)
from guestpull_server.registry.source import Stored

_MAX_INDEX_DEPTH: Final = 4  # an index of indexes is rare; deeper ones are a loop or a joke
_MAX_DOCUMENTS: Final = 32  # manifests and indexes that one resolution may look at


class Resolution:
    """One image of some contents, on its way through indexes to what is for a platform.

    Args:
        name: what errors call the image.
        reference: what the image is to be stored under.
        contents: where it comes from.
        platform: that it must run on.
        stored: who knows what is here already.
        limits: what it may cost.
    """

    def __init__(
        self,
        name: str,
        reference: str,
        contents: Contents,
        platform: Platform,
        stored: Stored,
        limits: Limits,
    ) -> None:
        self._name = name
        self._reference = reference
        self._contents = contents
        self._platform = platform
        self._stored = stored
        self._limits = limits
        self._documents = 0

    def resolve(self, target: str, depth: int = 0) -> ResolvedImage:
        """Resolve a tag or a digest.

        Raises:
            GuestpullError: what ImageSource.resolve says.
        """
        known = self._known(Digest(target)) if ":" in target else None
        if known is not None:
            return known
        self._documents += 1
        document = self._contents.manifest(target)
        known = self._known(document.digest) if ":" not in target else None
        if known is not None:
            return known
        found = read(document, self._limits.max_layers)
        match found:
            case ImageManifest():
                return self._image(document.digest, found)
            case ImageIndex():
                return dataclasses.replace(self.choose(document.digest, found, depth), index=document.content)

    def choose(self, digest: str, index: ImageIndex, depth: int = 0) -> ResolvedImage:
        """Resolve what an index has for the platform; `digest` is what errors call the index.

        Raises:
            GuestpullError: what ImageSource.resolve says.
        """
        *others, last = candidates(self._name, index, self._platform)
        if depth >= _MAX_INDEX_DEPTH or self._documents + len(others) > _MAX_DOCUMENTS:
            raise InvalidManifest(self._name, digest, "its indexes are nested too deep, or too many")
        for candidate in others:
            try:
                return self.resolve(candidate.digest, depth + 1)
            except (NoMatchingPlatform, UnsupportedImage):
                continue
        return self.resolve(last.digest, depth + 1)

    def _known(self, digest: Digest) -> ResolvedImage | None:
        known = self._stored(digest)
        if known is not None:
            config = read_config(self._name, known.image_id, known.config)
            check_platform(self._name, config.platform, self._platform)
        return known

    def _image(self, digest: Digest, manifest: ImageManifest) -> ResolvedImage:
        content = self._contents.config(manifest.config)
        config = read_config(self._name, manifest.config.digest, content)
        check_platform(self._name, config.platform, self._platform)
        layers = pair_layers(self._name, digest, manifest, config)
        return ResolvedImage(self._reference, digest, manifest.config.digest, content, layers)
