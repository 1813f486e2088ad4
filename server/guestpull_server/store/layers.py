"""layers/: how layers come into the store, who holds on to them, and how they go.

A layer comes as a staged directory that is renamed into place, and goes by being renamed out of sight before
it is deleted; the steps, and why they are in that order, are in durability.py. It stays as long as an image, a
bundle, or a pull that is under way uses it, and for a while after a pull that failed: the next try finds it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from guestpull_server.config import LayerNames
from guestpull_server.errors import InvalidRequest, StorageFailed, StorageFull, storage_errors
from guestpull_server.models import Digest, StoredLayer, UnpackedLayer
from guestpull_server.store.deletion import Deletion
from guestpull_server.store.durability import Durability
from guestpull_server.store.facts import LayerFacts
from guestpull_server.store.ledger import Ledger
from guestpull_server.store.outcomes import Deleted
from guestpull_server.store.paths import LayerPaths, is_directory
from guestpull_server.store.readonly import ReadOnlyStore
from guestpull_server.store.workdir import StagedLayer, WorkDir


class LayerShelf:
    """The layers of one work directory, and of the read-only stores beside it. Thread-safe.

    Args:
        work_dir: where the layers are.
        durability: of the work directory.
        ledger: what is written down of them; guarded by `lock`.
        paths: where they are, for the guest and here.
        read_only: other stores.
        lock: the store's.
    """

    def __init__(
        self,
        work_dir: WorkDir,
        durability: Durability,
        ledger: Ledger,
        paths: LayerPaths,
        read_only: Sequence[ReadOnlyStore],
        lock: threading.RLock,
    ) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._ledger = ledger
        self._paths = paths
        self._read_only = read_only
        self._naming = LayerNames.DIGEST
        self._lock = lock
        self._numbers: dict[Digest, int] = {}
        self.pinned: Counter[Digest] = Counter()
        """How many pulls hold on to a layer, which may be yet to come; guarded by the lock."""
        self._let_go: dict[Digest, float] = {}
        """When layers that nobody may use any more were last in use, as time.monotonic() has it."""

    def get(self, digest: Digest) -> StoredLayer | None:
        """See Store.layer."""
        found = self._ledger.catalog.layers.get(digest)
        if found is not None and self.is_present(found):
            return self._paths.localised(found)
        for store in self._read_only:
            found = store.layer(digest)
            # what is ours has an entry of ours: another store's entry for it may mean another store at our path
            if found is not None and not self._paths.is_ours(found):
                return found
        return None

    def all(self) -> tuple[StoredLayer, ...]:
        """See Store.layers."""
        with self._lock:
            ours = self._ledger.catalog.layers
            layers = {digest: self._paths.localised(layer) for digest, layer in ours.items()}
        for store in self._read_only:
            for digest, layer in store.layers.items():
                if not self._paths.is_ours(layer):
                    layers.setdefault(digest, layer)
        return tuple(layers.values())

    def is_present(self, layer: StoredLayer) -> bool:
        """See Store.is_present."""
        return is_directory(self._paths.local(layer))

    def is_read_only(self, layer: StoredLayer) -> bool:
        """See Store.is_read_only."""
        return self._work_dir.keeps_its_layers or not self._paths.is_ours(layer)

    def is_kept(self, layer: StoredLayer) -> bool:
        """Whether it is ours, and cannot go: layers/ is mounted read-only."""
        return self._work_dir.keeps_its_layers and self._paths.is_ours(layer) and self.is_present(layer)

    def record_of(self, layer: StoredLayer) -> str | None:
        """See Store.record_of."""
        path = self._paths.local(layer)
        store = os.path.dirname(os.path.dirname(path))
        record = os.path.join(store, "records", os.path.basename(self._work_dir.record_path(path)))
        return record if os.path.isfile(record) else None

    def name_as(self, asked: LayerNames | None) -> None:
        """Choose how new layers' directories are named; None: as those that are there.

        Raises:
            InvalidRequest: it would be otherwise than those that are there.
        """
        there = {
            LayerNames.INDEX if name.isdecimal() else LayerNames.DIGEST
            for name in self._paths.claims(self._ledger.catalog.layers.values())
        }
        if asked is None:
            self._naming = LayerNames.INDEX if there == {LayerNames.INDEX} else LayerNames.DIGEST
        elif there - {asked}:
            others = " and ".join(sorted(kind.value for kind in there))
            raise InvalidRequest(
                "layer names",
                f"{self._work_dir.path} has layers that are named by {others}, and image-rs opens no mixture",
                "Leave the option out, or make a store of its own.",
            )
        else:
            self._naming = asked

    # -- coming ---------------------------------------------------------------------------------------------

    def commit(self, staged: StagedLayer, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer:
        """See Store.commit_layer."""
        doing = f"committing layer {digest}"
        if self._work_dir.keeps_its_layers:
            raise StorageFailed(doing, self._work_dir.layers, "it is mounted read-only")
        with storage_errors(doing, self._work_dir.path):
            self._durability.sync_tree(staged.directory)
            with self._lock:
                self._work_dir.check()
                present = self.get(digest)
                if present is not None and present.uncompressed_digest == unpacked.diff_id:
                    return present
                facts = LayerFacts.of(digest, self._new_name(digest), unpacked)
                self._put_in_place(staged, facts)
                layer = self._ledger.put_layer(facts)
                self.let_go([digest])
                return self._paths.localised(layer)

    def _put_in_place(self, staged: StagedLayer, facts: LayerFacts) -> None:
        directory = os.path.join(self._work_dir.layers, facts.directory)
        if os.path.lexists(directory):  # without an entry, or with a wrong one
            self._work_dir.discard(directory)
            self._durability.sync_names(self._work_dir.layers)
        self._ledger.announce(facts)
        if os.path.lexists(staged.record_path):
            os.rename(staged.record_path, self._work_dir.record_path(facts.directory))
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
        """The running number of a layer: in the order in which layers were asked for, whichever comes first."""
        if digest not in self._numbers:
            # what an entry names may be gone: another layer in its place would be taken for it
            names = (
                *os.listdir(self._work_dir.layers),
                *self._paths.claims(self._ledger.catalog.layers.values()),
            )
            taken = [int(name) for name in names if name.isdecimal()]
            self._numbers[digest] = max([*taken, *self._numbers.values()], default=-1) + 1
        return self._numbers[digest]

    @contextmanager
    def pin(self, digests: Iterable[Digest]) -> Iterator[None]:
        """See Store.pin."""
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

    # -- going ----------------------------------------------------------------------------------------------

    def let_go(self, digests: Iterable[Digest]) -> None:
        """Note, under the lock, that layers were in use until now, and that nobody may use them any more.

        Layers that no pull brought are left out: in a store that was baked, or that another program made, layers
        without an image are meant to be there.
        """
        now = time.monotonic()
        for digest in digests:
            if self._ledger.is_timed(digest):
                self._let_go.pop(digest, None)
                self._let_go[digest] = now

    def let_go_before(self, moment: float) -> list[Digest]:
        """The layers that were let go before a moment, the oldest first, without those that a pull holds on to."""
        return [
            digest for digest, then in self._let_go.items() if then <= moment and digest not in self.pinned
        ]

    def let_go_at(self) -> list[float]:
        """When layers were let go, the first one first, without those that a pull holds on to."""
        return [then for digest, then in self._let_go.items() if digest not in self.pinned]

    def keep(self, digests: Iterable[Digest]) -> None:
        """Take back `let_go`, under the lock, for layers that are in use again, or gone."""
        for digest in digests:
            self._let_go.pop(digest, None)

    def drop(self, digests: Iterable[Digest], image_id: Digest | None = None) -> Deletion:
        """Forget layers, and an image with them, under the lock; `finish` deletes what is then out of sight.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        self._work_dir.check()
        catalog = self._ledger.catalog
        going = [
            catalog.layers[digest]
            for digest in digests
            if digest in catalog.layers and not self.is_kept(catalog.layers[digest])
        ]

        def forget() -> None:
            if image_id is not None:
                catalog.drop_image(image_id)
            for layer in going:
                catalog.drop_layer(layer.compressed_digest)

        deletion = Deletion(self._work_dir, self._durability, self._paths, self._alone(going))
        if image_id is not None or going:
            try:
                self._ledger.change(forget, frees=True)
            except StorageFull:
                # a full disk takes no new meta_store.json: make room first. Should the power go now, entries
                # lead to directories that are gone, which the next pull of that image puts right
                deletion.set_aside()
                deletion.delete()
                self._ledger.change(forget)
        deletion.set_aside()
        self.keep(layer.compressed_digest for layer in going)
        self._ledger.forget_facts(layer.compressed_digest for layer in going)
        return deletion

    def _alone(self, going: Sequence[StoredLayer]) -> list[StoredLayer]:
        """Those of some layers whose directories no other entry names: a false one must not delete another's."""
        digests = frozenset(layer.compressed_digest for layer in going)
        others = self._ledger.catalog.layers.items()
        claims = self._paths.claims(layer for digest, layer in others if digest not in digests)
        return [layer for layer in going if os.path.basename(self._paths.local(layer)) not in claims]

    def finish(self, deletion: Deletion) -> Deleted:
        """Delete what was dropped, without the lock.

        Raises:
            StorageFailed: the operating system refuses.
        """
        freed_bytes = deletion.delete()
        with self._lock:
            self._ledger.strike_out(deletion.layers)
        return Deleted(deletion.layers, freed_bytes)
