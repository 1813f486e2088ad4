"""images/: a copy of each image's entry in meta_store.json, in a file of its own; and indexes that names lead by.

With it, an image comes back when meta_store.json is damaged, if it is certain: the copy is one that we wrote
whole, its config has the digest that the image's id names, and that config names the layers.

An image may have a name whose digest is that of an index, and not of its manifest. The index is kept as long as
an image has that name: it proves without a network that the name leads to the image.
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
from guestpull_server.store.catalog import Catalog
from guestpull_server.store.durability import TEMPORARY, Durability
from guestpull_server.store.entries import EntryReader, ImageRecord, Unreadable, read_entry, written_entry
from guestpull_server.store.files import NoFile, read_file
from guestpull_server.store.workdir import WorkDir

_SUFFIX: Final = ".json"
_INDEX_SUFFIX: Final = ".index"
_DIRECTORY: Final = "images"
_ENDS: Final = (b"", b"\n", b"\r\n", b"\n\n")  # that JSON has no place for, and some configs close with


class ImageCopies:
    """The copies of one work directory. Not thread-safe."""

    def __init__(self, work_dir: WorkDir, durability: Durability) -> None:
        self._work_dir = work_dir.path
        self._directory = work_dir.images
        self._durability = durability

    def write(self, catalog: Catalog, image_ids: Iterable[Digest]) -> None:
        """Write the copies of images that there are; called before meta_store.json is written.

        A copy keeps its config to the letter: other programs write the one in meta_store.json anew in their own
        way, so that it has not the digest any more. An image of theirs gets no copy.
        """
        for image_id in sorted(image_ids):
            record, entry = catalog.images.get(image_id), catalog.image_entry(image_id)
            if record is None or entry is None:
                continue
            if exact_config(image_id, record.config) is None:
                try:
                    kept, _ = read_copy(_path_of_copy(self._work_dir, image_id), image_id)
                except (Unreadable, OSError):
                    continue
                entry = written_entry(read_entry(entry) | {"image_config": msgspec.Raw(kept.config)})
            self._durability.replace(_path_of_copy(self._work_dir, image_id), bytes(entry))

    def drop(self, catalog: Catalog, image_ids: Iterable[Digest]) -> None:
        """Delete the copies of images that there are no more; called after meta_store.json is written."""
        for image_id in image_ids:
            if catalog.image_entry(image_id) is None:
                with suppress(OSError):  # the next start deletes it as a stray
                    os.unlink(_path_of_copy(self._work_dir, image_id))
        with suppress(OSError):  # likewise
            self._drop_indexes(catalog)

    def drop_strays(self, catalog: Catalog) -> None:
        """Delete copies of images that there are no more, and half-written ones: what a crash left.

        Raises:
            OSError: the operating system refuses.
        """
        for name in os.listdir(self._directory):
            image_id = image_id_of(name.removesuffix(TEMPORARY))
            if image_id is not None and (name.endswith(TEMPORARY) or catalog.image_entry(image_id) is None):
                os.unlink(os.path.join(self._directory, name))
        self._drop_indexes(catalog)

    def write_index(self, digest: Digest, index: bytes) -> None:
        """Keep an image index; written once.

        Raises:
            OSError: the operating system refuses.
        """
        if _index_of(self._work_dir, digest) is None:
            self._durability.replace(_path_of_index(self._work_dir, digest), index)

    def _drop_indexes(self, catalog: Catalog) -> None:
        kept = [name for name in os.listdir(self._directory) if _INDEX_SUFFIX in name]
        if not kept:
            return
        names = (name for record in catalog.images.values() for name in record.references)
        pins = {name.partition("@")[2].replace(":", "_") for name in names}
        for name in kept:
            if name.removesuffix(_INDEX_SUFFIX) not in pins:
                os.unlink(os.path.join(self._directory, name))

    def image_ids(self) -> frozenset[Digest]:
        """The images that have a copy: those that were recorded here, and not by another program.

        Raises:
            OSError: the operating system refuses.
        """
        found = map(image_id_of, os.listdir(self._directory))
        return frozenset(image_id for image_id in found if image_id is not None)

    def take_in(self, catalog: Catalog) -> None:
        """Give a catalog the images that are certain, whose layers it has."""
        for record, entry in copies_of_others(self._work_dir, ()):
            known = [catalog.layers.get(layer.compressed_digest) for layer in record.layers]
            if all(
                one is not None and one.uncompressed_digest == layer.uncompressed_digest
                for one, layer in zip(known, record.layers, strict=True)
            ):
                catalog.take_in(record, entry)


def image_id_of(file_name: str) -> Digest | None:
    """The image that a file in images/ is a copy of; None for what is no copy."""
    if not file_name.endswith(_SUFFIX):
        return None
    try:
        return Digest(file_name.removesuffix(_SUFFIX).replace("_", ":", 1))
    except InvalidDigest:
        return None


def read_copy(path: str, image_id: Digest) -> tuple[ImageRecord, msgspec.Raw]:
    """A copy, as what it means and as it was written.

    Raises:
        Unreadable: it is none of that image.
        OSError: the operating system refuses.
    """
    try:
        content = read_file(path)
    except NoFile as error:
        raise Unreadable(str(error)) from None
    if content is None:
        raise Unreadable("it is gone")
    ((_, record),) = EntryReader().images({image_id: msgspec.Raw(content)})
    if isinstance(record, Unreadable):
        raise record
    if exact_config(image_id, record.config) is None:
        raise Unreadable("its image_config is not the one that its id names")
    return record, msgspec.Raw(content)


def exact_config(image_id: Digest, config: bytes) -> bytes | None:
    """An image config to the byte, from what a JSON document has of it; None if it is not what the id names."""
    return next((config + end for end in _ENDS if image_id.matches(config + end)), None)


@dataclass(frozen=True, slots=True)
class ProvedImage:
    """What an image's id proves, whatever else is said of it.

    Attributes:
        config: the image config, to the byte.
        diff_ids: its layers, bottom-most first.
        copy: what images/ says of the image; None if that cannot be used. Only its config is proved.
    """

    config: bytes
    diff_ids: tuple[str, ...]
    copy: ImageRecord | None

    def corrected(self, record: ImageRecord) -> ImageRecord:
        """What meta_store.json should say of the image; the same record where it does."""
        copy = self.copy or record
        kept = list(map(str, record.diff_ids)) == list(self.diff_ids)
        exact = exact_config(record.image_id, record.config) is not None
        return replace(
            record,
            config=record.config if exact else self.config,
            manifest_digest=copy.manifest_digest,
            other_digests=copy.other_digests,
            layers=record.layers if kept else copy.layers,
            metas=record.metas if kept else copy.metas,
        )


def prove_image(work_dir: str, image_id: Digest, config: bytes) -> ProvedImage | None:
    """Find the image config that an image's id names: in meta_store.json, or in the image's copy.

    Args:
        work_dir: the store that has the image.
        image_id: the digest of its config.
        config: the config as meta_store.json has it; another program may have written that one anew.
    """
    copy: ImageRecord | None = None
    with suppress(Unreadable, OSError):
        copy, _ = read_copy(_path_of_copy(work_dir, image_id), image_id)
    exact = exact_config(image_id, config)
    if exact is None and copy is not None:
        exact = exact_config(image_id, copy.config)
    if exact is None:
        return None
    rootfs = msgspec.json.decode(exact, type=ImageConfig).rootfs
    return ProvedImage(exact, tuple((rootfs.diff_ids if rootfs else None) or ()), copy)


def copies_of_others(work_dir: str, known: Container[Digest]) -> Iterator[tuple[ImageRecord, msgspec.Raw]]:
    """The copies that are proved of images that are not among those that are known.

    Raises:
        OSError: the operating system refuses.
    """
    directory = os.path.join(work_dir, _DIRECTORY)
    for name in sorted(os.listdir(directory)):
        image_id = image_id_of(name)
        if image_id is not None and image_id not in known:
            with suppress(Unreadable, OSError):
                yield read_copy(os.path.join(directory, name), image_id)


def has_copies(work_dir: str) -> bool:
    """Whether there is a copy that is proved of any image.

    Raises:
        OSError: the operating system refuses.
    """
    with suppress(FileNotFoundError):
        return next(copies_of_others(work_dir, ()), None) is not None
    return False


class _Manifest(msgspec.Struct, frozen=True):
    digest: str


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Manifest]


def led_to(work_dir: str, pin: Digest, manifest_digests: Collection[Digest]) -> Digest | None:
    """The manifest that a digest leads to, which an image was asked for by: its own, or that of an index.

    Args:
        work_dir: the store that has the image; the index is kept there.
        pin: the digest in the reference.
        manifest_digests: those of the image; None is answered where the digest leads to none of them.
    """
    if pin in manifest_digests:
        return pin
    content = _index_of(work_dir, pin)
    try:
        index = msgspec.json.decode(content or b"", type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    listed = {one.digest for one in index.manifests}
    return next((digest for digest in manifest_digests if digest in listed), None)


def _index_of(work_dir: str, digest: Digest) -> bytes | None:
    """An image index that is kept; None if it is not, or is another one by now."""
    with suppress(NoFile, OSError):
        content = read_file(_path_of_index(work_dir, digest))
        if content is not None and digest.matches(content):
            return content
    return None


def _path_of_index(work_dir: str, digest: Digest) -> str:
    return os.path.join(work_dir, _DIRECTORY, digest.directory_name + _INDEX_SUFFIX)


def has_copy(work_dir: str, image_id: Digest) -> bool:
    """Whether anything has the name of an image's copy, be it one or not."""
    return os.path.lexists(_path_of_copy(work_dir, image_id))


def _path_of_copy(work_dir: str, image_id: Digest) -> str:
    return os.path.join(work_dir, _DIRECTORY, image_id.directory_name + _SUFFIX)
