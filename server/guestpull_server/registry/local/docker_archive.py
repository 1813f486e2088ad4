"""Archives written by `docker save`, podman and skopeo: layers, configs, and a manifest.json that lists them.

These archives do not contain manifests as registries have them. So that an image has the same manifest digest each
time, a manifest is generated: an OCI manifest of the config and the layers as they are in the archive, in compact
JSON with the keys in the order below. Layers are usually plain tars, so the compressed digest of a layer is its
diff_id. The digest of a compressed layer (written by Docker's containerd image store) is that of its bytes.

The newer form of archive is an OCI layout as well. `docker-archive:` reads its manifest.json; `oci-archive:` reads
its index.json, and with it the manifest as it was pushed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    ImageNotFound,
    InvalidDigest,
    InvalidManifest,
    InvalidReference,
    InvalidRequest,
    NotInFile,
    storage_errors,
)
from guestpull_server.models import Descriptor, Digest, MiB, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry.documents import check_digest
from guestpull_server.registry.image_source import BlobStream, ResolvedManifest
from guestpull_server.registry.local.archive import GZIP_MAGIC, ZSTD_MAGIC
from guestpull_server.registry.local.blob import LocalBlob, read_document
from guestpull_server.registry.local.tree import Files, Part
from guestpull_server.registry.manifests import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    Document,
    ImageManifest,
    check_platform,
    pair_layers,
    read,
    read_config,
)
from guestpull_server.registry.reference import Reference

_MANIFEST: Final = "manifest.json"
_NAMED_BY_DIGEST: Final = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")
_PIECE_BYTES: Final = 1 * MiB


class _Image(msgspec.Struct, frozen=True, rename="pascal"):
    """An image in manifest.json."""

    config: str
    layers: list[str] | None = None
    repo_tags: list[str] | None = None


class DockerArchiveImage:
    """An ImageSource from a docker-archive.

    Args:
        files: the archive.
        name: the image, as errors name it.
        selected: a reference, or @N; empty if the archive has one image.
        limits: bounds on what is read.

    Raises:
        InvalidRequest: the archive has several images, and none was selected.
        ImageNotFound: the selected image is not in the archive.
        InvalidManifest: the file is not a docker-archive.
    """

    registry: Final = ""

    def __init__(self, files: Files, name: str, selected: str, limits: Limits) -> None:
        self._files = files
        self._name = name
        self._limits = limits
        self._parts: dict[Digest, Part] = {}
        content = read_document(name, files, _MANIFEST, limits.max_manifest_bytes, "max_manifest_bytes")
        try:
            images = msgspec.json.decode(content, type=list[_Image])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidManifest(name, _MANIFEST, str(error)) from None
        self._image, self.reference = _chosen(name, images, selected)

    def manifest(self, platform: Platform, cancellation: Cancellation) -> ResolvedManifest:
        """See ImageSource."""
        name, path = self._name, self._image.config
        content = read_document(name, self._files, path, self._limits.max_config_bytes, "max_config_bytes")
        image_id = Digest.of(content)
        named = _NAMED_BY_DIGEST.fullmatch(path)
        if named is not None:
            check_digest(f"{name}: image config", Digest(f"sha256:{named[1]}"), content, "the archive")
        config = read_config(name, image_id, content)
        check_platform(name, config.platform, platform)
        diff_ids = (config.rootfs.diff_ids if config.rootfs else None) or []
        layers = self._image.layers or []
        if len(diff_ids) != len(layers):
            problem = f"the config has {len(diff_ids)} diff_ids, {_MANIFEST} {len(layers)} layers"
            raise InvalidManifest(name, image_id, problem)
        blobs = [
            self._layer(path, diff_id, cancellation) for path, diff_id in zip(layers, diff_ids, strict=True)
        ]
        document = _generated_manifest(name, Descriptor(OCI_CONFIG, image_id, len(content)), blobs)
        manifest = read(document, self._limits.max_layers)
        assert isinstance(manifest, ImageManifest)
        pairs = pair_layers(name, document.digest, manifest, config)
        image = ResolvedImage(
            self.reference, document.digest, image_id, content, pairs, manifest=document.content
        )
        return ResolvedManifest(document.digest, platform, document, image)

    def image(self, manifest: ResolvedManifest, cancellation: Cancellation) -> ResolvedImage:
        """See ImageSource."""
        cancellation.check()
        assert manifest.image is not None, "self.manifest reads it"
        return manifest.image

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        """See ImageSource; call `manifest` first."""
        part = self._parts.get(blob.digest)
        if part is None:
            raise BlobNotFound(self._name, blob.digest, "the archive")
        return LocalBlob(self._name, part, blob, cancellation)

    def _layer(self, path: str, diff_id: str, cancellation: Cancellation) -> Descriptor:
        """Describe a layer of the archive, for the generated manifest."""
        part = self._files.find(path)
        if part is None:
            raise InvalidManifest(self._name, path, "layer not found in the archive")
        with storage_errors(f"reading {self._name}", path):
            magic = part.read_at(0, 4)
        suffix = "+gzip" if magic.startswith(GZIP_MAGIC) else "+zstd" if magic == ZSTD_MAGIC else ""
        named = _NAMED_BY_DIGEST.fullmatch(path)
        try:
            if not suffix:
                digest = Digest(diff_id)
            else:
                digest = Digest(f"sha256:{named[1]}") if named else self._hashed(part, path, cancellation)
        except InvalidDigest:
            raise InvalidManifest(self._name, path, f"invalid diff_id {diff_id!r}") from None
        self._parts[digest] = part
        return Descriptor(f"{OCI_LAYER}{suffix}", digest, part.size)

    def _hashed(self, part: Part, path: str, cancellation: Cancellation) -> Digest:
        hasher = hashlib.sha256()
        position = 0
        with storage_errors(f"reading {self._name}", path):
            while piece := part.read_at(position, _PIECE_BYTES):
                cancellation.check()
                hasher.update(piece)
                position += len(piece)
        return Digest(f"sha256:{hasher.hexdigest()}")


def _generated_manifest(name: str, config: Descriptor, layers: Sequence[Descriptor]) -> Document:
    """Generate the manifest of an image; see the module's docstring."""

    def described(one: Descriptor) -> dict[str, str | int]:
        return {"mediaType": one.media_type, "digest": str(one.digest), "size": one.size}

    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": described(config),
        "layers": [described(one) for one in layers],
    }
    content = msgspec.json.encode(manifest)
    return Document(name, Digest.of(content), content, OCI_MANIFEST)


def _chosen(name: str, images: Sequence[_Image], selected: str) -> tuple[_Image, str]:
    """Return the selected image, and its reference in the archive; empty if it has none."""
    if selected.startswith("@"):
        chosen = [image for number, image in enumerate(images) if str(number) == selected[1:]]
    elif selected:
        selected = str(Reference.parse(selected))
        chosen = [image for image in images if selected in _references(image)]
    else:
        chosen = list(images)
    if not chosen:
        if not selected:
            raise ImageNotFound(name, "the archive", "it has no images")
        raise NotInFile(name, "the archive", f"no image {selected}", _all_references(images))
    if len(chosen) > 1 and not selected:
        names = _all_references(images) or len(images)
        raise InvalidRequest(name, f"it contains several images: {names}", "Add :REF or :@N to select one.")
    references = _references(chosen[0])
    return chosen[0], selected if selected in references else next(iter(references), "")


def _all_references(images: Sequence[_Image]) -> str:
    return ", ".join(reference for image in images for reference in _references(image))


def _references(image: _Image) -> list[str]:
    """Return an image's tags as complete references, without those that are invalid."""
    references: list[str] = []
    for tag in image.repo_tags or ():
        with suppress(InvalidReference):
            references.append(str(Reference.parse(tag)))
    return references
