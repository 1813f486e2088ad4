"""What is written down of a store: meta_store.json, its images' copies, its layers' facts; read, and kept true.

In memory and on disk the same is known, or the disk is behind by what the next start finds out by itself: a layer
that was committed and is not in meta_store.json yet. A change that cannot be written has not happened.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import msgspec

from guestpull_server.errors import InvalidDigest, StorageFull, storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import catalog as catalogs
from guestpull_server.store import facts as facts_files
from guestpull_server.store.catalog import Catalog
from guestpull_server.store.copies import ImageCopies, has_copies
from guestpull_server.store.durability import Durability
from guestpull_server.store.entries import Unreadable, metas_problem
from guestpull_server.store.facts import (
    FactsFile,
    LayerFacts,
    contradiction,
    facts_beside,
    read_facts,
    standing_facts,
    with_facts,
)
from guestpull_server.store.files import NoFile
from guestpull_server.store.names import ImageNames
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.workdir import RECORD_SUFFIX, WorkDir


class Ledger:
    """The written state of one work directory. Not thread-safe: whoever uses it holds the store's lock.

    Attributes:
        catalog: what meta_store.json says.
        names: how its images are found.
        damaged: meta_store.json was damaged when it was read.
        warnings: what was found when it was read, and what was done about it; a sentence each.
    """

    def __init__(self, work_dir: WorkDir, durability: Durability, paths: LayerPaths) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._paths = paths
        self._copies = ImageCopies(work_dir, durability)
        self._facts_file = FactsFile(work_dir.path, durability)
        self._facts: dict[str, LayerFacts] = {}
        self._foreign_facts: dict[str, dict[str, LayerFacts]] = {}
        self._path = os.path.join(work_dir.path, catalogs.FILE_NAME)
        self._dirty = False
        self.catalog = Catalog()
        self.names = ImageNames({})
        self.damaged = False
        self.warnings: list[str] = []

    def read(self) -> None:
        """Read what is written, and put right what a crash, or another program, left behind.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("reading the meta store", self._path), _collector_paused():
            useless = self._read_facts()
            self._read_catalog()
            self.warnings += [f"{self._path}: {one}" for one in self.catalog.unusable]
            there = frozenset(os.listdir(self._work_dir.layers))
            self._take_layers_in(there)
            if self.damaged:
                self._copies.take_in(self.catalog)
                self.warnings.append(
                    f"{len(self.catalog.images)} images and {len(self.catalog.layers)} layers are certain and "
                    "were taken in again; pull what is missing"
                )
            else:
                self._copies.drop_strays(self.catalog)
            self._paths.find_moved(
                self.catalog.layers.values(), self._facts, is_made_elsewhere=self._work_dir.keeps_its_layers
            )
            if not self.damaged:
                self._drop_records_of_nothing(there)
            self._aim_at_the_guest()
            self._put_metas_right()
            self._recall_facts()
        self.names = ImageNames(self.catalog.images)
        # what is written here can be written later, and must not keep a full disk from being emptied
        with suppress(StorageFull):
            if useless > len(self._facts):
                self.rewrite_facts()
            self.flush()
        with suppress(OSError):  # there is none yet
            self._work_dir.reserve.keep(os.path.getsize(self._path))

    def _drop_records_of_nothing(self, there: Collection[str]) -> None:
        """Delete the records of layers that no entry names and that are not there: a commit that a crash cut off.

        Those of layers that have an entry stay: layers/ may be a mount that is not there yet.

        Args:
            there: what is in layers/.
        """
        records = (name for name in os.listdir(self._work_dir.records) if name.endswith(RECORD_SUFFIX))
        lone = [name for name in records if name.removesuffix(RECORD_SUFFIX) not in there]
        if lone:
            claimed = self._paths.claims(self.catalog.layers.values())
            for name in lone:
                if name.removesuffix(RECORD_SUFFIX) not in claimed:
                    os.unlink(os.path.join(self._work_dir.records, name))

    def _read_catalog(self) -> None:
        """Read meta_store.json; a damaged one is set aside under another name, never lost.

        One that is not there is damaged where there are copies of what it said.
        """
        try:
            read = Catalog.read(self._work_dir.path, self._paths.misplaced)
        except Unreadable as error:
            aside = self._set_aside(self._path)
            self.damaged = True
            self.warnings.append(f"{self._path} was damaged ({error}) and is now {aside}")
        else:
            self.catalog = read or Catalog()
            self.damaged = read is None and has_copies(self._work_dir.path)
            if self.damaged:
                self.warnings.append(f"{self._path} was gone")
        self._dirty |= self.damaged

    def _read_facts(self) -> int:
        """Read layer_facts.jsonl; returns how many of its lines are of no use. What is no file is set aside."""
        try:
            self._facts, useless = read_facts(self._work_dir.path)
        except NoFile as error:
            path = os.path.join(self._work_dir.path, facts_files.FILE_NAME)
            self.warnings.append(f"{path} was damaged ({error}) and is now {self._set_aside(path)}")
            return 0
        return useless

    def _set_aside(self, path: str) -> str:
        """Give what cannot be read another name, so that it is not lost; returns the name."""
        aside = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        while os.path.lexists(aside):
            aside += "+"
        os.rename(path, aside)
        self._durability.sync_names(self._work_dir.path)
        return aside

    def _take_layers_in(self, there: Collection[str]) -> None:
        """Believe the layers that were committed just before a crash, or whose entry was lost or altered.

        Args:
            there: what is in layers/.
        """
        claims = self._paths.claims(self.catalog.layers.values())
        standing = standing_facts(self._facts, there, claims)
        gone = self._facts.keys() - standing.keys()
        self._facts = standing
        # a line without a directory must not vouch for a directory that another program makes later
        self.strike_out(gone)
        self._drop_false_claims(claims)
        entries: Mapping[str, StoredLayer] = dict(self.catalog.layers.items())
        for digest, facts in self._facts.items():
            entry = entries.get(digest)
            altered = contradiction(entry, facts) if entry is not None else ""
            if entry is None or altered:
                with suppress(InvalidDigest):
                    self.catalog.put_layers(facts.layer(self._paths.written(facts.directory)))
                    self._dirty = True
            if altered:
                self.warnings.append(f"{self._path}: the entry of layer {digest} was put right: {altered}")

    def _aim_at_the_guest(self) -> None:
        """Have the entries of layers that are ours say where the guest sees them, where we were told."""
        if not self._paths.is_for_a_guest:
            return
        aimed = []
        for layer in self.catalog.layers.values():
            written = self._paths.written(os.path.basename(self._paths.local(layer)))
            if layer.store_path != written and self._paths.is_ours(layer):
                aimed.append(dataclasses.replace(layer, store_path=written))
        if aimed:
            self.catalog.put_layers(*aimed)
            self._dirty = True

    def _put_metas_right(self) -> None:
        """Have images say of their layers what layer_db says: image-rs mounts what they say."""
        recorded_here = self._copies.image_ids()
        for image_id, record in list(self.catalog.images.items()):
            of_another_program = image_id not in recorded_here
            problem = metas_problem(record, self.catalog.layers, of_another_program=of_another_program)
            known = (self.catalog.layers.get(layer.compressed_digest, layer) for layer in record.layers)
            if problem and [one.uncompressed_digest for one in known] == record.diff_ids:
                self.catalog.put_metas_right(image_id)
                self._dirty = True
                self.warnings.append(f"{self._path}: image {image_id} was put right: {problem}")

    def _recall_facts(self) -> None:
        """Have layers know what is known of them."""
        for layer in self.catalog.layers.values():
            self.catalog.layers[layer.compressed_digest] = with_facts(layer, self._facts_of(layer))

    def _drop_false_claims(self, claims: Mapping[str, Collection[str]]) -> None:
        """Forget entries that name a directory which is another layer's by its entry and by its facts."""
        for owner, facts in self._facts.items():
            for digest in sorted(claims.get(facts.directory, ())):
                if digest != owner and digest not in self._facts:
                    self.catalog.drop_layer(Digest(digest))
                    self._dirty = True
                    self.warnings.append(
                        f"{self._path}: the entry of layer {digest} was dropped: "
                        f"it names layers/{facts.directory}, which is layer {owner}"
                    )

    def _facts_of(self, layer: StoredLayer) -> LayerFacts | None:
        """What is known of a layer: here, or beside the foreign store that it lies in."""
        known = self._facts.get(layer.compressed_digest)
        if known is not None:
            return known
        path = self._paths.local(layer)
        foreign = os.path.dirname(os.path.dirname(path))
        if foreign == self._work_dir.path:
            return None
        if foreign not in self._foreign_facts:
            self._foreign_facts[foreign] = facts_beside(foreign)
        found = self._foreign_facts[foreign].get(layer.compressed_digest)
        return found if found is not None and found.directory == os.path.basename(path) else None

    # -- layers ---------------------------------------------------------------------------------------------

    def announce(self, facts: LayerFacts) -> None:
        """Write down the facts of a layer that is about to get its directory.

        Raises:
            OSError: the operating system refuses.
        """
        self._facts_file.add(facts)

    def put_layer(self, facts: LayerFacts) -> StoredLayer:
        """Know a layer that has its directory; meta_store.json names it from the next `flush` on."""
        layer = facts.layer(self._paths.written(facts.directory))
        self._facts[layer.compressed_digest] = facts
        self.catalog.put_layers(layer)
        self._dirty = True
        return layer

    def forget_facts(self, digests: Iterable[str]) -> None:
        """Forget the facts of layers whose directories went; `strike_out` makes it last."""
        for digest in digests:
            self._facts.pop(digest, None)

    def strike_out(self, digests: Iterable[str]) -> None:
        """Write down that layers are gone, but for those that have come again.

        On a full disk it is left to the next start.

        Raises:
            StorageFailed: the operating system refuses.
        """
        self._work_dir.check()
        with suppress(StorageFull), storage_errors("writing down what is gone", self._work_dir.path):
            self._facts_file.strike_out(digest for digest in digests if digest not in self._facts)

    def is_timed(self, digest: Digest) -> bool:
        """Whether the time of a layer's commit is known: then a pull brought it, and it was not baked."""
        facts = self._facts.get(digest)
        return facts is not None and facts.committed_at > 0

    def by_time(self) -> list[Digest]:
        """The layers that have a time, the oldest first."""
        timed = (layer for layer in self.catalog.layers if self.is_timed(layer))
        return sorted(timed, key=lambda digest: self._facts[digest].committed_at)

    def forget_times(self) -> None:
        """Forget when layers were committed; `rewrite_facts` makes it last."""
        self._facts = {
            digest: msgspec.structs.replace(facts, committed_at=0) for digest, facts in self._facts.items()
        }

    def rewrite_facts(self) -> None:
        """Write down the facts of the layers that there are, and no more, in a fixed order.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._work_dir.check()
        with storage_errors("writing the facts of layers", self._work_dir.path):
            self._facts_file.rewrite(self._facts)

    def keep_index(self, digest: Digest, index: bytes) -> None:
        """Keep an image index for as long as an image has a name with its digest.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._work_dir.check()
        with storage_errors("keeping an image index", self._work_dir.path):
            self._copies.write_index(digest, index)

    # -- meta_store.json ------------------------------------------------------------------------------------

    def change(self, change: Callable[[], object], *, frees: bool = False) -> None:
        """Change the catalog, in memory and on disk or, if that fails, in neither.

        Args:
            change: changes it.
            frees: what is not needed afterwards makes room on the disk, so that the reserve may be used.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        try:
            with self.catalog.all_or_nothing():
                change()
                self._dirty = True
                try:
                    self.flush()
                except StorageFull:
                    if not (frees and self._work_dir.reserve.give_up()):
                        raise
                    self.flush()
        finally:
            self.names = ImageNames(self.catalog.images)

    def flush(self) -> None:
        """Write meta_store.json, if it is not as it should be.

        Raises:
            StorageFull: the file system has no room; the file is as it was, and the next flush tries again.
            StorageFailed: the operating system refuses; likewise.
        """
        if not self._dirty:
            return
        self._work_dir.check()
        with storage_errors("writing the meta store", self._path):
            content = self.catalog.encode()
            if self.catalog.touched and not os.path.lexists(self._path):
                # where there are copies and no such file, it was lost
                self._durability.replace(self._path, Catalog().encode(), mode=0o644)
            self._copies.write(self.catalog, self.catalog.touched)
            self._durability.replace(self._path, content, mode=0o644)
        self._work_dir.reserve.keep(len(content))
        self._dirty = False
        self._copies.drop(self.catalog, self.catalog.touched)
        self.catalog.touched.clear()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking what is being read, again and again.

    With 10,000 layers in 2,000 images it took 60 of 190 ms.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
