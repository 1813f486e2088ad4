"""The state of a store on disk: meta_store.json, the backups of its images, the metadata of its layers.

Memory and disk agree, or the disk lacks only what the next start finds by itself: entries of layers that were
committed since the last flush. A change that cannot be written is undone in memory.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import msgspec

from guestpull_server.errors import InvalidDigest, StorageFull, storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import layer_metadata, meta_store
from guestpull_server.store.durability import Durability
from guestpull_server.store.entries import metas_problem
from guestpull_server.store.image_backups import ImageBackups
from guestpull_server.store.image_names import ImageNames
from guestpull_server.store.layer_metadata import (
    LayerMetadata,
    contradiction,
    read_metadata,
    replace_old_file,
    with_metadata,
    write_metadata,
)
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.meta_store import MetaStore
from guestpull_server.store.survey import Survey, collector_paused, survey
from guestpull_server.store.workdir import TAR_SPLIT_SUFFIX, WorkDir


class MetadataDb:
    """The written state of one work directory. Not thread-safe: callers hold the store's lock.

    Attributes:
        meta_store: the content of meta_store.json.
        names: an index of its images.
        damaged: meta_store.json was damaged or lost when it was read.
        warnings: what was found when it was read, and what was done about it; a sentence each.
    """

    def __init__(self, work_dir: WorkDir, durability: Durability, paths: LayerPaths) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._paths = paths
        self._backups = ImageBackups(work_dir, durability)
        self._metadata: dict[str, LayerMetadata] = {}
        self._foreign_metadata: dict[str, dict[str, LayerMetadata]] = {}
        self._path = os.path.join(work_dir.path, meta_store.FILE_NAME)
        self._dirty = False
        self._has_old_file = False
        self.meta_store = MetaStore()
        self.names = ImageNames({})
        self.damaged = False
        self.warnings: list[str] = []

    # -- the start ------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the state, and correct what a crash or another program left behind.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("reading the meta store", self._path), collector_paused():
            found = survey(self._work_dir.path, self._paths)
            self._use(found)
            self._delete_unused_metadata(found)
            self._drop_false_claims(found)
            self._restore_entries()
            if self.damaged:
                self._backups.restore(self.meta_store)
                self.warnings.append(
                    f"{len(self.meta_store.images)} images and {len(self.meta_store.layers)} layers are certain "
                    "and were restored; pull what is missing"
                )
            else:
                self._backups.drop_strays(self.meta_store)
            self._paths.find_moved(
                self.meta_store.layers.values(),
                self._metadata,
                is_made_elsewhere=self._work_dir.keeps_its_layers,
            )
            if not self.damaged:
                self._delete_unused_tar_splits(found)
            self._write_paths_of_guest()
            self._correct_layer_metas()
            for layer in self.meta_store.layers.values():
                self.meta_store.layers[layer.compressed_digest] = with_metadata(
                    layer, self._metadata_of(layer)
                )
        self.names = ImageNames(self.meta_store.images)
        # this can be written later, and must not prevent a full disk from being emptied
        with suppress(StorageFull):
            self._replace_old_file()
            self.flush()
        with suppress(OSError):  # it does not exist yet
            self._work_dir.preallocated_space.keep(os.path.getsize(self._path))

    def _use(self, found: Survey) -> None:
        """Take over what was read. Rename damaged files, so that they are not lost."""
        old_file = os.path.join(self._work_dir.path, layer_metadata.OLD_FILE_NAME)
        if found.files.old_file_damage:
            aside = self._set_aside(old_file)
            self.warnings.append(f"{old_file} was damaged ({found.files.old_file_damage}) and is now {aside}")
        self._has_old_file = found.files.has_old_file and not found.files.old_file_damage
        self._metadata = found.metadata
        self.meta_store = found.meta_store
        self.damaged = bool(found.damage)
        if self.damaged and found.is_missing:
            self.warnings.append(f"{self._path} was lost")
        elif self.damaged:
            aside = self._set_aside(self._path)
            self.warnings.append(f"{self._path} was damaged ({found.damage}) and is now {aside}")
        self._dirty |= self.damaged
        self.warnings += [f"{self._path}: {one}" for one in self.meta_store.unusable]

    def _set_aside(self, path: str) -> str:
        """Rename a file that cannot be read, so that it is not lost; return its new name."""
        aside = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        while os.path.lexists(aside):
            aside += "+"
        os.rename(path, aside)
        self._durability.sync_names(self._work_dir.path)
        return aside

    def _delete_unused_metadata(self, found: Survey) -> None:
        """Delete metadata of no layer: it must not make a directory trusted that another program creates later."""
        for name, problem in found.files.damaged:
            path = os.path.join(self._work_dir.records, name)
            self.warnings.append(f"{path} was damaged ({problem}) and was deleted")
        names = [*found.unused_metadata(), *(name for name, _ in found.files.damaged)]
        for name in names:
            path = os.path.join(self._work_dir.records, name)
            if os.path.lexists(path):  # not of the old file
                self._work_dir.discard(path)
        if names:
            self._durability.sync_names(self._work_dir.records)

    def _delete_unused_tar_splits(self, found: Survey) -> None:
        """Delete tar-splits without a directory: what an interrupted commit left.

        Those of layers that have an entry stay: layers/ may be a mount that is not there yet.
        """
        there = frozenset(found.layer_directories)
        names = (name for name in found.records if name.endswith(TAR_SPLIT_SUFFIX))
        lone = [name for name in names if name.removesuffix(TAR_SPLIT_SUFFIX) not in there]
        if lone:
            claimed = self._paths.claims(self.meta_store.layers.values())
            for name in lone:
                if name.removesuffix(TAR_SPLIT_SUFFIX) not in claimed:
                    os.unlink(os.path.join(self._work_dir.records, name))

    def _drop_false_claims(self, found: Survey) -> None:
        """Delete entries that point to a directory of another layer, which has both an entry and metadata."""
        for owner, metadata in self._metadata.items():
            for digest in sorted(found.claims.get(metadata.directory, ())):
                if digest != owner and digest not in self._metadata:
                    self.meta_store.drop_layer(Digest(digest))
                    self._dirty = True
                    self.warnings.append(
                        f"{self._path}: the entry of layer {digest} was deleted: "
                        f"it points to layers/{metadata.directory}, which is layer {owner}"
                    )

    def _restore_entries(self) -> None:
        """Restore the entries of layers that were committed just before a crash, and those that were altered."""
        entries: Mapping[str, StoredLayer] = dict(self.meta_store.layers.items())
        for digest, metadata in self._metadata.items():
            entry = entries.get(digest)
            altered = contradiction(entry, metadata) if entry is not None else ""
            if entry is None or altered:
                with suppress(InvalidDigest):
                    self.meta_store.put_layers(metadata.layer(self._paths.written(metadata.directory)))
                    self._dirty = True
            if altered:
                self.warnings.append(f"{self._path}: the entry of layer {digest} was corrected: {altered}")

    def _write_paths_of_guest(self) -> None:
        """Make the entries of our layers point to the guest's path, if one was given."""
        if not self._paths.is_for_a_guest:
            return
        changed = []
        for layer in self.meta_store.layers.values():
            written = self._paths.written(os.path.basename(self._paths.local(layer)))
            if layer.store_path != written and self._paths.is_ours(layer):
                changed.append(dataclasses.replace(layer, store_path=written))
        if changed:
            self.meta_store.put_layers(*changed)
            self._dirty = True

    def _correct_layer_metas(self) -> None:
        """Make the layer_metas of images match layer_db: image-rs mounts what layer_metas contains."""
        recorded_here = self._backups.image_ids()
        known = self.meta_store.layers
        for image_id, record in list(self.meta_store.images.items()):
            problem = metas_problem(record, known, of_another_program=image_id not in recorded_here)
            current = (known.get(layer.compressed_digest, layer) for layer in record.layers)
            if problem and [one.uncompressed_digest for one in current] == record.diff_ids:
                self.meta_store.correct_layer_metas(image_id)
                self._dirty = True
                self.warnings.append(f"{self._path}: image {image_id} was corrected: {problem}")

    def _metadata_of(self, layer: StoredLayer) -> LayerMetadata | None:
        """Return a layer's metadata, here or in the other store that has the layer."""
        known = self._metadata.get(layer.compressed_digest)
        if known is not None:
            return known
        path = self._paths.local(layer)
        foreign = os.path.dirname(os.path.dirname(path))
        if foreign == self._work_dir.path:
            return None
        if foreign not in self._foreign_metadata:
            self._foreign_metadata[foreign] = read_metadata(foreign).layers
        found = self._foreign_metadata[foreign].get(layer.compressed_digest)
        return found if found is not None and found.directory == os.path.basename(path) else None

    def _replace_old_file(self) -> None:
        """Replace layer_facts.jsonl of an earlier version, if there is one.

        Raises:
            StorageFull: the file system has no room; the file stays, and is read again.
            StorageFailed: the operating system refuses; likewise.
        """
        if self._has_old_file:
            self._work_dir.check()
            with storage_errors("writing the metadata of layers", self._work_dir.records):
                replace_old_file(self._work_dir.path, self._durability, self._metadata.values())
            self._has_old_file = False

    # -- layers ---------------------------------------------------------------------------------------------

    def put_layer(self, metadata: LayerMetadata) -> StoredLayer:
        """Add a layer whose directory is in place; meta_store.json has its entry from the next `flush` on."""
        layer = metadata.layer(self._paths.written(metadata.directory))
        self._metadata[layer.compressed_digest] = metadata
        self.meta_store.put_layers(layer)
        self._dirty = True
        return layer

    def forget_metadata(self, digests: Iterable[str]) -> None:
        """Forget the metadata of layers that are deleted.

        layer_facts.jsonl, which a full disk may have kept from being replaced, must not describe them any more.

        Raises:
            StorageFailed: the operating system refuses.
        """
        for digest in digests:
            self._metadata.pop(digest, None)
        with suppress(StorageFull):
            self._replace_old_file()

    def is_timed(self, digest: Digest) -> bool:
        """Return whether the time of a layer's commit is known: it was pulled, not baked."""
        metadata = self._metadata.get(digest)
        return metadata is not None and metadata.committed_at > 0

    def by_time(self) -> list[Digest]:
        """Return the layers with a known time, the oldest first."""
        timed = (layer for layer in self.meta_store.layers if self.is_timed(layer))
        return sorted(timed, key=lambda digest: self._metadata[digest].committed_at)

    def erase_times(self) -> None:
        """Erase the times of all commits, in memory and on disk.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._replace_old_file()
        timed = {
            digest: msgspec.structs.replace(metadata, committed_at=0)
            for digest, metadata in self._metadata.items()
            if metadata.committed_at
        }
        self._work_dir.check()
        with storage_errors("writing the metadata of layers", self._work_dir.records):
            write_metadata(self._work_dir.path, self._durability, timed.values())
        self._metadata |= timed

    def keep_index(self, digest: Digest, index: bytes) -> None:
        """Keep an image index as long as an image has a name with its digest.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._work_dir.check()
        with storage_errors("keeping an image index", self._work_dir.path):
            self._backups.write_index(digest, index)

    # -- meta_store.json ------------------------------------------------------------------------------------

    def change(self, change: Callable[[], object], *, frees: bool = False) -> None:
        """Change the meta store in memory and on disk or, if that fails, in neither.

        Args:
            change: changes `meta_store`.
            frees: the change allows files to be deleted, so the preallocated space may be used.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        try:
            with self.meta_store.all_or_nothing():
                change()
                self._dirty = True
                try:
                    self.flush()
                except StorageFull:
                    if not (frees and self._work_dir.preallocated_space.release()):
                        raise
                    self.flush()
        finally:
            self.names = ImageNames(self.meta_store.images)

    def flush(self) -> None:
        """Write meta_store.json if it is out of date.

        Raises:
            StorageFull: the file system has no room; the file is unchanged, and the next flush tries again.
            StorageFailed: the operating system refuses; likewise.
        """
        if not self._dirty:
            return
        self._work_dir.check()
        touched = self.meta_store.touched
        with storage_errors("writing the meta store", self._path):
            content = self.meta_store.encode()
            if touched and not os.path.lexists(self._path):
                # backups without this file mean that it was lost
                self._durability.replace(self._path, MetaStore().encode(), mode=0o644)
            self._backups.write(self.meta_store, touched)
            self._durability.replace(self._path, content, mode=0o644)
        self._work_dir.preallocated_space.keep(len(content))
        self._dirty = False
        self._backups.drop(self.meta_store, touched)
        touched.clear()
