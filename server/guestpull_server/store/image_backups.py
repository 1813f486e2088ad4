"""images/: a backup of each image's entry in meta_store.json, in a file of its own; and image indexes.

An image whose backup is valid is restored when meta_store.json is damaged or lost. A backup is valid if its config
has the digest that the image id is, and if the config lists the layers.

An image may have a name with the digest of an index instead of its manifest's. The index is kept as long as an
image has that name: it proves without a network that the digest leads to the image.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Digest, ImageConfig
from guestpull_server.store.durability import TEMPORARY, Durability
from guestpull_server.store.entries import EntryReader, ImageRecord, Unreadable, decode_entry, encode_entry
from guestpull_server.store.filesystem import NotAFile, read_file
from guestpull_server.store.meta_store import MetaStore
from guestpull_server.store.workdir import WorkDir

_SUFFIX: Final = ".json"
_INDEX_SUFFIX: Final = ".index"
_DIRECTORY: Final = "images"
_ENDS: Final = (
    b"",
    b"\n",
    b"\r\n",
    b"\n\n",
)  # that some configs end with, and that a JSON value cannot contain


class ImageBackups:
    """The backups in one work directory. Not thread-safe."""

    def __init__(self, work_dir: WorkDir, durability: Durability) -> None:
        self._work_dir = work_dir.path
        self._directory = work_dir.images
        self._durability = durability

    def write(self, meta_store: MetaStore, image_ids: Iterable[Digest]) -> None:
        """Write the backups of the images that exist; call it before meta_store.json is written.

        A backup keeps the config byte for byte: other programs reformat the config in meta_store.json, so that it
        no longer has the digest. Their images get no backup.
        """
        for image_id in sorted(image_ids):
            record, entry = meta_store.images.get(image_id), meta_store.image_entry(image_id)
            if record is None or entry is None:
                continue
            if exact_config(image_id, record.config) is None:
                try:
                    kept, _ = read_backup(_backup_path(self._work_dir, image_id), image_id)
                except (Unreadable, OSError):
                    continue
                entry = encode_entry(decode_entry(entry) | {"image_config": msgspec.Raw(kept.config)})
            self._durability.replace(_backup_path(self._work_dir, image_id), bytes(entry))

    def drop(self, meta_store: MetaStore, image_ids: Iterable[Digest]) -> None:
        """Delete the backups of images that no longer exist; call it after meta_store.json is written."""
        for image_id in image_ids:
            if meta_store.image_entry(image_id) is None:
                with suppress(OSError):  # the next start deletes it
                    os.unlink(_backup_path(self._work_dir, image_id))
        with suppress(OSError):  # the next start deletes them
            self._drop_indexes(meta_store)

    def drop_strays(self, meta_store: MetaStore) -> None:
        """Delete backups of images that no longer exist, and half-written ones: what a crash left.

        Raises:
            OSError: the operating system refuses.
        """
        for name in os.listdir(self._directory):
            image_id = image_id_of(name.removesuffix(TEMPORARY))
            if image_id is not None and (
                name.endswith(TEMPORARY) or meta_store.image_entry(image_id) is None
            ):
                os.unlink(os.path.join(self._directory, name))
        self._drop_indexes(meta_store)

    def write_index(self, digest: Digest, index: bytes) -> None:
        """Keep an image index, unless it is there already.

        Raises:
            OSError: the operating system refuses.
        """
        if _kept_index(self._work_dir, digest) is None:
            self._durability.replace(_index_path(self._work_dir, digest), index)

    def _drop_indexes(self, meta_store: MetaStore) -> None:
        kept = [name for name in os.listdir(self._directory) if _INDEX_SUFFIX in name]
        if not kept:
            return
        names = (name for record in meta_store.images.values() for name in record.references)
        pins = {name.partition("@")[2].replace(":", "_") for name in names}
        for name in kept:
            if name.removesuffix(_INDEX_SUFFIX) not in pins:
                os.unlink(os.path.join(self._directory, name))

    def image_ids(self) -> frozenset[Digest]:
        """Return the images that have a backup: those that were recorded here, not by another program.

        Raises:
            OSError: the operating system refuses.
        """
        found = map(image_id_of, os.listdir(self._directory))
        return frozenset(image_id for image_id in found if image_id is not None)

    def restore(self, meta_store: MetaStore) -> None:
        """Add the images with a valid backup to a meta store that has their layers."""
        for record, entry in backups_except(self._work_dir, ()):
            known = [meta_store.layers.get(layer.compressed_digest) for layer in record.layers]
            if all(
                one is not None and one.uncompressed_digest == layer.uncompressed_digest
                for one, layer in zip(known, record.layers, strict=True)
            ):
                meta_store.restore_image(record, entry)


def image_id_of(file_name: str) -> Digest | None:
    """Return the image that a file in images/ is a backup of, by its name; None if it is not a backup."""
    if not file_name.endswith(_SUFFIX):
        return None
    try:
        return Digest(file_name.removesuffix(_SUFFIX).replace("_", ":", 1))
    except InvalidDigest:
        return None


def read_backup(path: str, image_id: Digest) -> tuple[ImageRecord, msgspec.Raw]:
    """Return a backup as an image record, and as the entry that was written.

    Raises:
        Unreadable: it is not a backup of that image.
        OSError: the operating system refuses.
    """
    try:
        content = read_file(path)
    except NotAFile as error:
        raise Unreadable(str(error)) from None
    if content is None:
        raise Unreadable("it does not exist")
    ((_, record),) = EntryReader().images({image_id: msgspec.Raw(content)})
    if isinstance(record, Unreadable):
        raise record
    if exact_config(image_id, record.config) is None:
        raise Unreadable("its image_config does not have the digest that the image id is")
    return record, msgspec.Raw(content)


def exact_config(image_id: Digest, config: bytes) -> bytes | None:
    """Return the bytes of an image config, given its JSON value; None if it does not match the image id."""
    return next((config + end for end in _ENDS if image_id.matches(config + end)), None)


@dataclass(frozen=True, slots=True)
class ProvedImage:
    """What an image id proves.

    Attributes:
        config: the image config, byte for byte.
        diff_ids: the layers, bottom-most first.
        backup: the image's backup; None if it is unusable. Only the config in it is proved.
    """

    config: bytes
    diff_ids: tuple[str, ...]
    backup: ImageRecord | None

    def corrected(self, record: ImageRecord) -> ImageRecord:
        """Return the image's record as it should be; an equal record if it is correct."""
        backup = self.backup or record
        kept = list(map(str, record.diff_ids)) == list(self.diff_ids)
        exact = exact_config(record.image_id, record.config) is not None
        return replace(
            record,
            config=record.config if exact else self.config,
            manifest_digest=backup.manifest_digest,
            other_digests=backup.other_digests,
            layers=record.layers if kept else backup.layers,
            metas=record.metas if kept else backup.metas,
        )


def prove_image(work_dir: str, image_id: Digest, config: bytes) -> ProvedImage | None:
    """Find the image config that has the image id as its digest, in meta_store.json or in the image's backup.

    Args:
        work_dir: the store that has the image.
        image_id: the digest of the config.
        config: the config in meta_store.json, which another program may have reformatted.
    """
    backup: ImageRecord | None = None
    with suppress(Unreadable, OSError):
        backup, _ = read_backup(_backup_path(work_dir, image_id), image_id)
    exact = exact_config(image_id, config)
    if exact is None and backup is not None:
        exact = exact_config(image_id, backup.config)
    if exact is None:
        return None
    rootfs = msgspec.json.decode(exact, type=ImageConfig).rootfs
    return ProvedImage(exact, tuple((rootfs.diff_ids if rootfs else None) or ()), backup)


def backups_except(work_dir: str, known: Container[Digest]) -> Iterator[tuple[ImageRecord, msgspec.Raw]]:
    """Yield the valid backups of all images but those that are known.

    Raises:
        OSError: the operating system refuses.
    """
    directory = os.path.join(work_dir, _DIRECTORY)
    for name in sorted(os.listdir(directory)):
        image_id = image_id_of(name)
        if image_id is not None and image_id not in known:
            with suppress(Unreadable, OSError):
                yield read_backup(os.path.join(directory, name), image_id)


def has_backups(work_dir: str) -> bool:
    """Return whether there is a valid backup of any image.

    Raises:
        OSError: the operating system refuses.
    """
    with suppress(FileNotFoundError):
        return next(backups_except(work_dir, ()), None) is not None
    return False


class _Manifest(msgspec.Struct, frozen=True):
    digest: str


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Manifest]


def manifest_for_pin(work_dir: str, pin: Digest, manifest_digests: Collection[Digest]) -> Digest | None:
    """Return the manifest that the digest in a reference leads to, itself or through an index that is kept.

    Returns None if the digest leads to no manifest of the image.

    Args:
        work_dir: the store that has the image and keeps the index.
        pin: the digest in the reference.
        manifest_digests: those of the image.
    """
    if pin in manifest_digests:
        return pin
    content = _kept_index(work_dir, pin)
    try:
        index = msgspec.json.decode(content or b"", type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    listed = {one.digest for one in index.manifests}
    return next((digest for digest in manifest_digests if digest in listed), None)


def _kept_index(work_dir: str, digest: Digest) -> bytes | None:
    """Return an image index; None if it is not kept, or no longer has its digest."""
    with suppress(NotAFile, OSError):
        content = read_file(_index_path(work_dir, digest))
        if content is not None and digest.matches(content):
            return content
    return None


def _index_path(work_dir: str, digest: Digest) -> str:
    return os.path.join(work_dir, _DIRECTORY, digest.directory_name + _INDEX_SUFFIX)


def has_backup(work_dir: str, image_id: Digest) -> bool:
    """Return whether anything has the name of an image's backup, valid or not."""
    return os.path.lexists(_backup_path(work_dir, image_id))


def _backup_path(work_dir: str, image_id: Digest) -> str:
    return os.path.join(work_dir, _DIRECTORY, image_id.directory_name + _SUFFIX)
