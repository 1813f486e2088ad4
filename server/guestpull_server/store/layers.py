"""layers/: how layers are added, kept, and deleted.

A layer is committed by renaming a staged directory, and deleted by renaming it to staging/ first; durability.py
explains the steps and their order. It is kept as long as an image, a bundle, or a running pull uses it. After a
failed pull it is kept for some time, so that the next attempt finds it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from guestpull_server.config import LayerNames
from guestpull_server.errors import InvalidRequest, StorageFailed, StorageFull, storage_errors
from guestpull_server.models import Digest, StoredLayer, UnpackedLayer
from guestpull_server.store.durability import Durability, create
from guestpull_server.store.filesystem import is_directory, remove_tree
from guestpull_server.store.layer_metadata import LayerMetadata
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.metadata_db import MetadataDb
from guestpull_server.store.read_only import ReadOnlyStore
from guestpull_server.store.workdir import StagedLayer, WorkDir


@dataclass(frozen=True, slots=True)
class Deleted:
    """Layers that were deleted, and the bytes of files that were freed."""

    layers: tuple[Digest, ...] = ()
    freed_bytes: int = 0


class Deletion:
    """A deletion in progress: first renamed out of sight under the store's lock, then deleted without the lock.

    Attributes:
        layers: the layers whose directories existed and are deleted.
    """

    def __init__(
        self, work_dir: WorkDir, durability: Durability, paths: LayerPaths, going: Sequence[StoredLayer]
    ) -> None:
        self.layers: tuple[Digest, ...] = ()
        self._work_dir = work_dir
        self._durability = durability
        self._going = {layer.compressed_digest: paths.local(layer) for layer in going if paths.is_ours(layer)}
        self._aside: list[str] = []
        self._freed_bytes = 0

    def set_aside(self) -> None:
        """Rename the directories, then their metadata and tar-splits, to staging/. May be repeated."""
        with storage_errors("deleting layers", self._work_dir.layers):
            for digest, path in self._going.items():
                if self._set_aside(path):
                    self.layers += (digest,)
            if self._aside:
                self._durability.sync_names(self._work_dir.layers)
        with storage_errors("deleting the metadata of layers", self._work_dir.records):
            records = [
                self._set_aside(record)
                for path in self._going.values()
                for record in (self._work_dir.metadata_path(path), self._work_dir.tar_split_path(path))
            ]
            if any(records):
                self._durability.sync_names(self._work_dir.records)

    def _set_aside(self, path: str) -> bool:
        if not os.path.lexists(path):
            return False
        self._aside.append(self._work_dir.set_aside(path))
        return True

    def delete(self) -> int:
        """Delete what was renamed; return the bytes of all files that were deleted so far."""
        with storage_errors("deleting layers", self._work_dir.staging):
            while self._aside:
                self._freed_bytes += remove_tree(self._aside.pop(0))
        return self._freed_bytes


class LayerRepository:
    """The layers of one work directory, and of its read-only stores. Thread-safe.

    Args:
        work_dir: the work directory.
        durability: syncs the work directory.
        db: the state on disk; guarded by `lock`.
        paths: where the layers are.
        read_only: other stores.
        lock: the store's lock.

    Attributes:
        pinned: how many pulls use a layer, whether it exists yet or not; guarded by the lock.
    """

    def __init__(
        self,
        work_dir: WorkDir,
        durability: Durability,
        db: MetadataDb,
        paths: LayerPaths,
        read_only: Sequence[ReadOnlyStore],
        lock: threading.RLock,
    ) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._db = db
        self._paths = paths
        self._read_only = read_only
        self._naming = LayerNames.DIGEST
        self._lock = lock
        self._numbers: dict[Digest, int] = {}
        self.pinned: Counter[Digest] = Counter()
        self._let_go: dict[Digest, float] = {}
        """When layers that may be unused were last in use, by time.monotonic(); the oldest first."""

    def get(self, digest: Digest) -> StoredLayer | None:
        """Return a layer that has an entry and a directory, here or in a read-only store."""
        found = self._db.meta_store.layers.get(digest)
        if found is not None and self.is_present(found):
            return self._paths.localised(found)
        for store in self._read_only:
            found = store.layer(digest)
            # our layers have our entries: an entry of another store may mean another store at our path
            if found is not None and not self._paths.is_ours(found):
                return found
        return None

    def all(self) -> tuple[StoredLayer, ...]:
        """Return all layers that have an entry, our own first."""
        with self._lock:
            ours = self._db.meta_store.layers
            layers = {digest: self._paths.localised(layer) for digest, layer in ours.items()}
        for store in self._read_only:
            for digest, layer in store.layers.items():
                if not self._paths.is_ours(layer):
                    layers.setdefault(digest, layer)
        return tuple(layers.values())

    def is_present(self, layer: StoredLayer) -> bool:
        """Return whether a layer's directory exists."""
        return is_directory(self._paths.local(layer))

    def is_read_only(self, layer: StoredLayer) -> bool:
        """Return whether a layer cannot be changed or deleted."""
        return self._work_dir.keeps_its_layers or not self._paths.is_ours(layer)

    def is_kept(self, layer: StoredLayer) -> bool:
        """Return whether a layer is ours and cannot be deleted, because layers/ is mounted read-only."""
        return self._work_dir.keeps_its_layers and self._paths.is_ours(layer) and self.is_present(layer)

    def tar_split_of(self, layer: StoredLayer) -> str | None:
        """Return the path of a layer's tar-split, in the store that has the layer, or None."""
        path = self._paths.local(layer)
        store = os.path.dirname(os.path.dirname(path))
        tar_split = os.path.join(store, "records", os.path.basename(self._work_dir.tar_split_path(path)))
        return tar_split if os.path.isfile(tar_split) else None

    def name_as(self, requested: LayerNames | None) -> None:
        """Choose how the directories of new layers are named; None: like those of existing layers.

        Raises:
            InvalidRequest: existing layers are named differently.
        """
        existing = {
            LayerNames.INDEX if name.isdecimal() else LayerNames.DIGEST
            for name in self._paths.claims(self._db.meta_store.layers.values())
        }
        if requested is None:
            self._naming = LayerNames.INDEX if existing == {LayerNames.INDEX} else LayerNames.DIGEST
        elif existing - {requested}:
            others = " and ".join(sorted(kind.value for kind in existing))
            raise InvalidRequest(
                "layer names",
                f"the layers in {self._work_dir.path} are named by {others}, and image-rs opens no mixture",
                "Leave the option out, or use another work directory.",
            )
        else:
            self._naming = requested

    # -- adding ---------------------------------------------------------------------------------------------

    def commit(self, staged: StagedLayer, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer:
        """Make a staged layer part of the store. The steps are those of durability.py."""
        doing = f"committing layer {digest}"
        if self._work_dir.keeps_its_layers:
            raise StorageFailed(doing, self._work_dir.layers, "it is mounted read-only")
        with storage_errors(doing, self._work_dir.path):
            with self._lock:
                self._work_dir.check()
                present = self._present(digest, unpacked)
                if present is not None:
                    return present
                metadata = LayerMetadata.of(digest, self._new_name(digest), unpacked)
            create(staged.metadata_path, metadata.encode())
            self._durability.sync_tree(staged.directory)
            with self._lock:
                self._work_dir.check()
                present = self._present(digest, unpacked)  # committed by somebody else meanwhile
                if present is not None:
                    return present
                self._put_in_place(staged, metadata.directory)
                layer = self._db.put_layer(metadata)
                self.let_go([digest])
                return self._paths.localised(layer)

    def _present(self, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer | None:
        found = self.get(digest)
        return found if found is not None and found.uncompressed_digest == unpacked.diff_id else None

    def _put_in_place(self, staged: StagedLayer, name: str) -> None:
        directory = os.path.join(self._work_dir.layers, name)
        if os.path.lexists(directory):  # it has no entry, or a wrong one
            self._work_dir.discard(directory)
            self._durability.sync_names(self._work_dir.layers)
        os.rename(staged.metadata_path, self._work_dir.metadata_path(name))
        if os.path.lexists(staged.tar_split_path):
            os.rename(staged.tar_split_path, self._work_dir.tar_split_path(name))
        self._durability.sync_names(self._work_dir.records)
        os.rename(staged.directory, directory)
        self._durability.sync_names(self._work_dir.layers)

    def _new_name(self, digest: Digest) -> str:
        match self._naming:
            case LayerNames.DIGEST:
                return digest.directory_name
            case LayerNames.INDEX:
                return str(self._number_of(digest))

    def _number_of(self, digest: Digest) -> int:
        """Return the running number of a layer: in the order of the requests, not of the commits."""
        if digest not in self._numbers:
            # the directory that an entry points to may be missing: it must not become another layer's
            names = (
                *os.listdir(self._work_dir.layers),
                *self._paths.claims(self._db.meta_store.layers.values()),
            )
            taken = [int(name) for name in names if name.isdecimal()]
            self._numbers[digest] = max([*taken, *self._numbers.values()], default=-1) + 1
        return self._numbers[digest]

    @contextmanager
    def pin(self, digests: Iterable[Digest]) -> Iterator[None]:
        """Keep layers from being deleted while the context lasts, including layers that do not exist yet."""
        pinned = tuple(digests)
        with self._lock:
            self.pinned.update(pinned)
            if self._naming is LayerNames.INDEX:
                for digest in pinned:
                    if self.get(digest) is None:
                        self._number_of(digest)
        try:
            yield
        finally:
            with self._lock:
                self.pinned.subtract(pinned)
                self.pinned = +self.pinned
                if self._let_go:
                    self.let_go(digest for digest in pinned if digest in self._let_go)

    # -- deleting; all but `finish` under the lock ----------------------------------------------------------

    def let_go(self, digests: Iterable[Digest]) -> None:
        """Note that layers were in use until now, and may be unused from now on.

        Ignores layers that were not pulled: layers without an image are meant to stay in a store that was baked,
        or that another program made.
        """
        now = time.monotonic()
        for digest in digests:
            if self._db.is_timed(digest):
                self._let_go.pop(digest, None)
                self._let_go[digest] = now

    def let_go_before(self, moment: float) -> list[Digest]:
        """Return the layers that were let go before a moment and are not pinned, the oldest first."""
        return [
            digest for digest, then in self._let_go.items() if then <= moment and digest not in self.pinned
        ]

    def let_go_at(self) -> list[float]:
        """Return when layers that are not pinned were let go, in ascending order."""
        return [then for digest, then in self._let_go.items() if digest not in self.pinned]

    def keep(self, digests: Iterable[Digest]) -> None:
        """Undo `let_go` for layers that are in use again, or deleted."""
        for digest in digests:
            self._let_go.pop(digest, None)

    def drop(self, digests: Iterable[Digest], image_id: Digest | None = None) -> Deletion:
        """Delete the entries of layers, and of an image, and rename their directories; `finish` deletes the files.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        self._work_dir.check()
        meta_store = self._db.meta_store
        going = [
            meta_store.layers[digest]
            for digest in digests
            if digest in meta_store.layers and not self.is_kept(meta_store.layers[digest])
        ]

        def forget() -> None:
            if image_id is not None:
                meta_store.drop_image(image_id)
            for layer in going:
                meta_store.drop_layer(layer.compressed_digest)

        deletion = Deletion(self._work_dir, self._durability, self._paths, self._unshared(going))
        if image_id is not None or going:
            try:
                self._db.change(forget, frees=True)
            except StorageFull:
                # no room for a new meta_store.json: delete the files first. After a power cut now, entries point
                # to directories that are missing, which the next pull of the image repairs
                deletion.set_aside()
                deletion.delete()
                self._db.change(forget)
        deletion.set_aside()
        self.keep(layer.compressed_digest for layer in going)
        self._db.forget_metadata(layer.compressed_digest for layer in going)
        return deletion

    def _unshared(self, going: Sequence[StoredLayer]) -> list[StoredLayer]:
        """Return the layers whose directories no other entry points to: a wrong entry must not delete a layer."""
        digests = frozenset(layer.compressed_digest for layer in going)
        others = self._db.meta_store.layers.items()
        claims = self._paths.claims(layer for digest, layer in others if digest not in digests)
        return [layer for layer in going if os.path.basename(self._paths.local(layer)) not in claims]

    def finish(self, deletion: Deletion) -> Deleted:
        """Delete the files of a deletion, without the lock.

        Raises:
            StorageFailed: the operating system refuses.
        """
        freed_bytes = deletion.delete()
        return Deleted(deletion.layers, freed_bytes)
