"""The state of a work directory as it is on disk, read in one place and one order.

Used by the start of a store (metadata_db.py), by audit and gc (inventory.py), and by read-only stores
(read_only.py). Nothing here changes the disk.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from guestpull_server.store.entries import Unreadable
from guestpull_server.store.filesystem import is_read_only
from guestpull_server.store.image_backups import has_backups
from guestpull_server.store.layer_metadata import (
    SUFFIX,
    LayerMetadata,
    MetadataFiles,
    read_metadata,
    without_contradictions,
)
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.meta_store import MetaStore


@dataclass(frozen=True, slots=True)
class Survey:
    """What a work directory contains. `paths` is shared with the caller; all else is a snapshot.

    Attributes:
        meta_store: the content of meta_store.json; empty if it is missing or damaged.
        is_missing: meta_store.json does not exist.
        damage: why meta_store.json cannot be read, or that it was lost; "" if neither.
        files: all metadata that was read.
        claims: the layers whose entries point to each directory in layers/.
        metadata: the metadata of layers whose directories exist and belong to them, by compressed digest.
        paths: where the layers are.
        layer_directories: the names in layers/.
        keeps_its_layers: layers/ is mounted read-only.
        records: the names in records/.
        images: the names in images/.
    """

    meta_store: MetaStore
    is_missing: bool
    damage: str
    files: MetadataFiles
    claims: dict[str, set[str]]
    metadata: dict[str, LayerMetadata]
    paths: LayerPaths
    layer_directories: tuple[str, ...]
    keeps_its_layers: bool
    records: tuple[str, ...]
    images: tuple[str, ...]

    def unused_metadata(self) -> list[str]:
        """Return the names in records/ of metadata that describes no layer."""
        others = self.files.layers.keys() - self.metadata.keys()
        return [*self.files.unused, *sorted(self.files.layers[one].directory + SUFFIX for one in others)]

    def find_moved(self, *, is_made_elsewhere: bool) -> None:
        """Find the layers that are not where their entries point; see LayerPaths.find_moved."""
        self.paths.find_moved(
            self.meta_store.layers.values(), self.metadata, is_made_elsewhere=is_made_elsewhere
        )


def survey(work_dir: str, paths: LayerPaths) -> Survey:
    """Read the state of a work directory.

    meta_store.json is read last, because a daemon that runs meanwhile writes a layer's entry last.

    Raises:
        OSError: the operating system refuses.
    """
    layers = os.path.join(work_dir, "layers")
    layer_directories = names_in(layers)
    records = names_in(os.path.join(work_dir, "records"))
    files = read_metadata(work_dir, layer_directories, records)
    damage = ""
    try:
        meta_store = MetaStore.read(work_dir, paths.misplaced)
        if meta_store is None and has_backups(work_dir):
            damage = "it is missing, but there are backups of its images"
    except Unreadable as error:
        meta_store, damage = MetaStore(), str(error)
    found = meta_store if meta_store is not None else MetaStore()
    claims = paths.claims(found.layers.values())
    return Survey(
        meta_store=found,
        is_missing=meta_store is None,
        damage=damage,
        files=files,
        claims=claims,
        metadata=without_contradictions(files.layers, claims),
        paths=paths,
        layer_directories=layer_directories,
        keeps_its_layers=bool(layer_directories) and is_read_only(layers),
        records=records,
        images=names_in(os.path.join(work_dir, "images")),
    )


def names_in(directory: str) -> tuple[str, ...]:
    """Return the names in a directory, sorted; none if it does not exist.

    Raises:
        OSError: the operating system refuses.
    """
    try:
        return tuple(sorted(os.listdir(directory)))
    except FileNotFoundError:
        return ()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which would traverse again and again what is being read.

    With 10,000 layers in 2,000 images it took 60 of 190 ms.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
