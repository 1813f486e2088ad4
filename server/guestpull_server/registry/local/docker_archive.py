"""What `docker save`, podman and skopeo write: images as tars of layers, and a manifest.json that lists them.

Such an archive has no manifest as registries know it. So that the store has one name for the same image whenever
it comes from such an archive, one is made up: an OCI manifest of the config and the layers as they lie in it, in
compact JSON with the keys in the order below; its digest is the image's manifest digest. Layers are plain tars, as
a rule, so that a layer's compressed digest is its diff_id. A compressed one (Docker's containerd image store
writes them) is known by the digest of its bytes.

The newer form, in which the archive is an OCI layout as well, is read by its manifest.json; `oci-archive:` reads
the same file by its index.json, and finds the manifest as it was pushed.
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
from guestpull_server.registry.contents import check_digest
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
from guestpull_server.registry.source import BlobStream, ResolvedManifest

_MANIFEST: Final = "manifest.json"
_NAMED_BY_DIGEST: Final = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")
_PIECE_BYTES: Final = 1 * MiB


class _Image(msgspec.Struct, frozen=True, rename="pascal"):
    """One image of manifest.json."""

    config: str
    layers: list[str] | None = None
    repo_tags: list[str] | None = None


class DockerArchiveImage:
    """An ImageSource from a docker-archive.

    Args:
        files: the archive.
        name: what errors call the image: the text that named it.
        wanted: which image: a reference, or @N; empty if there is one alone.
        limits: what it may cost.

    Raises:
        InvalidRequest: there are several images, and none was named.
        ImageNotFound: there is none of that name.
        InvalidManifest: it is no docker-archive.
    """

    registry: Final = ""

    def __init__(self, files: Files, name: str, wanted: str, limits: Limits) -> None:
        self._files = files
        self._name = name
        self._limits = limits
        self._parts: dict[Digest, Part] = {}
        content = read_document(name, files, _MANIFEST, limits.max_manifest_bytes, "max_manifest_bytes")
        try:
            images = msgspec.json.decode(content, type=list[_Image])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidManifest(name, _MANIFEST, str(error)) from None
        self._image, self.reference = _chosen(name, images, wanted)

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
        document = _made_up(name, Descriptor(OCI_CONFIG, image_id, len(content)), blobs)
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
        """What a manifest says of a layer of the archive."""
        part = self._files.find(path)
        if part is None:
            raise InvalidManifest(self._name, path, "there is no such layer in the archive")
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
            raise InvalidManifest(self._name, path, f"diff_id {diff_id!r} is no digest") from None
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


def _made_up(name: str, config: Descriptor, layers: Sequence[Descriptor]) -> Document:
    """The manifest that stands for an image of the archive; see the module's docstring."""

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


def _chosen(name: str, images: Sequence[_Image], wanted: str) -> tuple[_Image, str]:
    """The image that is wanted, and the reference that it has there; empty where it has none."""
    if wanted.startswith("@"):
        chosen = [image for number, image in enumerate(images) if str(number) == wanted[1:]]
    elif wanted:
        wanted = str(Reference.parse(wanted))
        chosen = [image for image in images if wanted in _references(image)]
    else:
        chosen = list(images)
    if not chosen:
        if not wanted:
            raise ImageNotFound(name, "the archive", "it is empty")
        raise NotInFile(name, "the archive", f"no image {wanted}", _all_references(images))
    if len(chosen) > 1 and not wanted:
        names = _all_references(images) or len(images)
        raise InvalidRequest(name, f"there are several images: {names}", "Add :REF or :@N.")
    references = _references(chosen[0])
    return chosen[0], wanted if wanted in references else next(iter(references), "")


def _all_references(images: Sequence[_Image]) -> str:
    return ", ".join(reference for image in images for reference in _references(image))


def _references(image: _Image) -> list[str]:
    """An image's tags as references in full; those that are none are left out."""
    references: list[str] = []
    for tag in image.repo_tags or ():
        with suppress(InvalidReference):
            references.append(str(Reference.parse(tag)))
    return references
