"""images/: a copy of each image's entry in meta_store.json, in a file of its own.

With it, an image comes back when meta_store.json is damaged, if it is certain: the copy is one that we wrote
whole, its config has the digest that the image's id names, and that config names the layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Digest
from guestpull_server.store.catalog import Catalog
from guestpull_server.store.durability import TEMPORARY, Durability
from guestpull_server.store.entries import EntryReader, ImageRecord, Unreadable, read_entry, written_entry
from guestpull_server.store.files import NoFile, read_file
from guestpull_server.store.workdir import WorkDir

_SUFFIX: Final = ".json"


class ImageCopies:
    """The copies of one work directory. Not thread-safe."""

    def __init__(self, work_dir: WorkDir, durability: Durability) -> None:
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
            if not _is_named_by(image_id, record.config):
                try:
                    kept, _ = read_copy(self._path(image_id), image_id)
                except (Unreadable, OSError):
                    continue
                entry = written_entry(read_entry(entry) | {"image_config": msgspec.Raw(kept.config)})
            self._durability.replace(self._path(image_id), bytes(entry))

    def drop(self, catalog: Catalog, image_ids: Iterable[Digest]) -> None:
        """Delete the copies of images that there are no more; called after meta_store.json is written."""
        for image_id in image_ids:
            if catalog.image_entry(image_id) is None:
                with suppress(OSError):  # the next start deletes it as a stray
                    os.unlink(self._path(image_id))

    def drop_strays(self, catalog: Catalog) -> None:
        """Delete copies of images that there are no more, and half-written ones: what a crash left.

        Raises:
            OSError: the operating system refuses.
        """
        for name in os.listdir(self._directory):
            image_id = image_id_of(name.removesuffix(TEMPORARY))
            if image_id is not None and (name.endswith(TEMPORARY) or catalog.image_entry(image_id) is None):
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
        for name in sorted(os.listdir(self._directory)):
            image_id = image_id_of(name)
            if image_id is None:
                continue
            with suppress(Unreadable, OSError):
                record, entry = read_copy(os.path.join(self._directory, name), image_id)
                known = [catalog.layers.get(layer.compressed_digest) for layer in record.layers]
                if all(
                    one is not None and one.uncompressed_digest == layer.uncompressed_digest
                    for one, layer in zip(known, record.layers, strict=True)
                ):
                    catalog.take_in(record, entry)

    def _path(self, image_id: Digest) -> str:
        return os.path.join(self._directory, image_id.directory_name + _SUFFIX)


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
    if not _is_named_by(image_id, record.config):
        raise Unreadable("its image_config is not the one that its id names")
    return record, msgspec.Raw(content)


def _is_named_by(image_id: Digest, config: bytes) -> bool:
    # JSON has no place for the line end that some configs close with
    return any(image_id.matches(config + end) for end in (b"", b"\n"))
