"""OCI image layouts, in a directory or an archive (OCI image-layout.md).

`index.json` lists the images. An image is selected by its tag, which is the annotation
`org.opencontainers.image.ref.name`, or by the complete name that containerd and BuildKit write beside it. Entries
with the same name are one image for several platforms.
"""

from __future__ import annotations

from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    ImageNotFound,
    InvalidManifest,
    InvalidReference,
    InvalidRequest,
    NotInFile,
    SizeMismatch,
)
from guestpull_server.models import Descriptor, Digest, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry.documents import check_digest
from guestpull_server.registry.image_source import BlobStream, ResolvedManifest
from guestpull_server.registry.local.blob import LocalBlob, read_document, read_if_there
from guestpull_server.registry.local.tree import Files
from guestpull_server.registry.manifests import OCI_INDEX, Document, ImageIndex, IndexEntry, read
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.resolution import Resolution

_TAG: Final = "org.opencontainers.image.ref.name"
_FULL_NAME: Final = "io.containerd.image.name"
_INDEX: Final = "index.json"


class LayoutImage:
    """An ImageSource from an OCI image layout.

    Args:
        files: the layout.
        name: the image, as errors name it.
        tag: the image to select; empty if the layout has one image.
        limits: bounds on what is read.

    Raises:
        InvalidRequest: the layout has several images, and none was selected.
        ImageNotFound: the layout has no images, or none with this tag.
        InvalidManifest: the files are not an image layout.
    """

    registry: Final = ""

    def __init__(self, files: Files, name: str, tag: str, limits: Limits) -> None:
        self._files = files
        self._name = name
        self._limits = limits
        content = read_document(name, files, _INDEX, limits.max_manifest_bytes, "max_manifest_bytes")
        index = read(Document(name, Digest.of(content), content, OCI_INDEX), limits.max_layers)
        if not isinstance(index, ImageIndex):
            raise InvalidManifest(name, _INDEX, "it is not an image index")
        self._index = ImageIndex(_chosen(name, index.entries, tag))
        self.reference = _reference(self._index.entries)

    def manifest(self, platform: Platform, cancellation: Cancellation) -> ResolvedManifest:
        """See ImageSource."""
        return self._resolution(platform, cancellation).choose(_INDEX, self._index)

    def image(self, manifest: ResolvedManifest, cancellation: Cancellation) -> ResolvedImage:
        """See ImageSource."""
        return self._resolution(manifest.platform, cancellation).image(manifest)

    def _resolution(self, platform: Platform, cancellation: Cancellation) -> Resolution:
        documents = _LayoutDocuments(self._files, self._name, self._limits, cancellation)
        return Resolution(self._name, self.reference, documents, platform, self._limits)

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        """See ImageSource."""
        part = self._files.find(_path(blob.digest))
        if part is None:
            raise BlobNotFound(self._name, blob.digest, "the layout")
        return LocalBlob(self._name, part, blob, cancellation)


class _LayoutDocuments:
    """The documents of a layout."""

    def __init__(self, files: Files, name: str, limits: Limits, cancellation: Cancellation) -> None:
        self._files = files
        self._name = name
        self._limits = limits
        self._cancellation = cancellation

    def manifest(self, target: str) -> Document:
        self._cancellation.check()
        digest, limit = Digest(target), self._limits.max_manifest_bytes
        content = self._read(digest, limit, "max_manifest_bytes")
        if content is None:
            raise ImageNotFound(self._name, "the layout", f"no {_path(digest)}")
        check_digest(f"{self._name}: manifest", digest, content, "the layout")
        return Document(self._name, digest, content, "")

    def config(self, blob: Descriptor) -> bytes:
        self._cancellation.check()
        content = self._read(blob.digest, self._limits.max_config_bytes, "max_config_bytes")
        if content is None:
            raise BlobNotFound(self._name, blob.digest, "the layout")
        if len(content) != blob.size:
            raise SizeMismatch(f"{self._name}: image config", blob.size, len(content), "the layout")
        check_digest(f"{self._name}: image config", blob.digest, content, "the layout")
        return content

    def _read(self, digest: Digest, limit: int, limit_name: str) -> bytes | None:
        return read_if_there(self._name, self._files, _path(digest), limit, limit_name)


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex}"


def _names(entry: IndexEntry) -> tuple[str, ...]:
    annotations = entry.descriptor.annotations
    return tuple(annotations[key] for key in (_FULL_NAME, _TAG) if annotations.get(key))


def _chosen(name: str, entries: tuple[IndexEntry, ...], tag: str) -> tuple[IndexEntry, ...]:
    """Return the entries of one image: those with the tag, or all if they have the same name."""
    if tag:
        chosen = tuple(entry for entry in entries if any(_same(one, tag) for one in _names(entry)))
    elif len({_names(entry) for entry in entries}) > 1:
        tags = sorted({one for entry in entries for one in _names(entry)[-1:]})
        raise InvalidRequest(
            name, f"it contains several images: {', '.join(tags)}", "Add :TAG to select one."
        )
    else:
        chosen = entries
    if not chosen:
        if not tag:
            raise ImageNotFound(name, "the layout", "it has no images")
        names = sorted({one for entry in entries for one in _names(entry)[-1:]})
        raise NotInFile(name, "the layout", f"no tag {tag}", ", ".join(names))
    return chosen


def _same(found: str, other: str) -> bool:
    """Whether two names are the same, short or complete."""
    return found == other or (bool(_full(found)) and _full(found) == _full(other))


def _reference(entries: tuple[IndexEntry, ...]) -> str:
    return next((full for one in _names(entries[0]) if (full := _full(one))), "")


def _full(name: str) -> str:
    """Return a name as a complete reference; empty if it is only a tag, without a repository."""
    if "/" not in name and ":" not in name:
        return ""
    try:
        return str(Reference.parse(name))
    except InvalidReference:
        return ""
