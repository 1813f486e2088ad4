"""What lies in a work directory, read without changing anything there: the ground for audits and for gc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from guestpull_server import config
from guestpull_server.errors import InvalidStore, storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import catalog as catalogs
from guestpull_server.store import facts as fact_files
from guestpull_server.store.bundle_files import READY, BundleFile, is_bundle_directory, read_bundle_file
from guestpull_server.store.catalog import Catalog
from guestpull_server.store.copies import has_copies, image_id_of
from guestpull_server.store.durability import TEMPORARY
from guestpull_server.store.entries import Unreadable
from guestpull_server.store.facts import LayerFacts, read_facts, standing_facts
from guestpull_server.store.files import NoFile
from guestpull_server.store.filesystems import is_read_only
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.workdir import LOCK, RECORD_SUFFIX, ROOMS, owner_of

_KNOWN_FILES: Final = frozenset(
    {LOCK, catalogs.FILE_NAME, fact_files.FILE_NAME, config.FILE_NAME, "lost+found", *ROOMS}
)

_SET_ASIDE: Final = tuple(f"{name}.corrupt-" for name in (catalogs.FILE_NAME, fact_files.FILE_NAME))


@dataclass(frozen=True, slots=True)
class Inventory:
    """A work directory at one moment. Names are those in the directory that the field tells of.

    Attributes:
        work_dir: the work directory.
        owner: the process that owns it now, which may change it meanwhile; None: nobody.
        damage: why meta_store.json cannot be read; "" if it can, or has never been there.
        facts_damage: why layer_facts.jsonl cannot be; likewise.
        catalog: what it says; an empty one where it is damaged.
        facts: the facts of layers whose directories are there, by compressed digest.
        paths: where layers are.
        layer_directories: what is in layers/.
        keeps_its_layers: layers/ is mounted read-only.
        records: what is in records/.
        images: what is in images/.
        staging: what is in staging/.
        bundles: the bundles that are ready, by their directories' names in overlay/.
        unfinished: directories in overlay/ of bundles that a pull was making.
        unreadable: directories in overlay/ of bundles that do not say which.
        strange: names in overlay/ that are none of ours, nor image-rs's.
        set_aside: files of the work directory that were meta_store.json or layer_facts.jsonl, and were damaged.
        half_written: files that were being written; their paths in the work directory.
        unknown: other names in the work directory.
    """

    work_dir: str
    owner: str | None
    damage: str
    facts_damage: str
    catalog: Catalog
    facts: dict[str, LayerFacts]
    paths: LayerPaths
    layer_directories: tuple[str, ...]
    keeps_its_layers: bool
    records: tuple[str, ...]
    images: tuple[str, ...]
    staging: tuple[str, ...]
    bundles: dict[str, BundleFile]
    unfinished: tuple[str, ...]
    unreadable: tuple[str, ...]
    strange: tuple[str, ...]
    set_aside: tuple[str, ...]
    half_written: tuple[str, ...]
    unknown: tuple[str, ...]

    def path(self, *names: str) -> str:
        """The path of something in the work directory."""
        return os.path.join(self.work_dir, *names)

    def directory_of(self, layer: StoredLayer) -> str | None:
        """A layer's name in layers/; None if it lies in another store."""
        if not self.paths.is_ours(layer):
            return None
        return os.path.basename(self.paths.local(layer))

    def claimed_directories(self) -> frozenset[str]:
        """The names in layers/ that belong to a layer, by its entry, its facts, or a bundle that has it."""
        named = {self.directory_of(layer) for layer in self.catalog.layers.values()}
        named |= {facts.directory for facts in self.facts.values()}
        named |= {Digest(text).directory_name for bundle in self.bundles.values() for text in bundle.layers}
        return frozenset(name for name in named if name is not None)

    def used_layers(self) -> frozenset[Digest]:
        """The layers that images or bundles use."""
        images = self.catalog.images.values()
        used = {layer.compressed_digest for record in images for layer in record.layers}
        used.update(Digest(layer) for bundle in self.bundles.values() for layer in bundle.layers)
        return frozenset(used)

    def users_of_layers(self) -> dict[Digest, list[Digest]]:
        """The images that have each layer."""
        users: dict[Digest, list[Digest]] = {}
        for record in self.catalog.images.values():
            for layer in dict.fromkeys(record.layers):
                users.setdefault(layer.compressed_digest, []).append(record.image_id)
        return users

    def strays(self) -> list[str]:
        """What is in layers/ and belongs to no layer, and can go; its paths.

        Where entries cannot be used, nobody knows what they stand for, and nothing counts as a stray.
        """
        if self.damage or self.catalog.unusable or self.keeps_its_layers:
            return []
        claimed = self.claimed_directories()
        return [self.path("layers", name) for name in self.layer_directories if name not in claimed]

    def orphans(self) -> list[str]:
        """Records without a layer, and copies without an image; their paths."""
        strays = frozenset(self.strays())
        directories = {name for name in self.layer_directories if self.path("layers", name) not in strays}
        records = [
            self.path("records", name)
            for name in self.records
            if name.endswith(RECORD_SUFFIX) and name.removesuffix(RECORD_SUFFIX) not in directories
        ]
        if self.damage:
            return records
        copies = [
            self.path("images", name)
            for name in self.images
            if (image_id := image_id_of(name)) is not None and self.catalog.image_entry(image_id) is None
        ]
        return records + copies

    def foreign(self) -> list[str]:
        """What is in records/ and images/, and is no record and no copy; its paths."""
        records = [self.path("records", name) for name in self.records if not name.endswith(RECORD_SUFFIX)]
        copies = [
            self.path("images", name)
            for name in self.images
            if image_id_of(name) is None and f"images/{name}" not in self.half_written
        ]
        return records + copies

    def unwritten_layers(self) -> list[LayerFacts]:
        """The facts of layers that were committed, and that meta_store.json does not name."""
        if self.damage:
            return []
        named: frozenset[str] = frozenset(self.catalog.layers)
        claims = self.paths.claims(self.catalog.layers.values())
        return [
            facts
            for digest, facts in sorted(self.facts.items())
            if digest not in named and facts.directory not in claims
        ]


def take_inventory(work_dir: str, guest_work_dir: str | None = None) -> Inventory:
    """See what lies in a work directory.

    Args:
        work_dir: the work directory.
        guest_work_dir: the same, as its guest sees it; None: as here.

    Raises:
        InvalidStore: there is no such directory.
        StorageFailed: the operating system refuses.
    """
    work_dir = os.path.abspath(work_dir)
    if not os.path.isdir(work_dir):
        raise InvalidStore(work_dir, "there is no such directory")
    owner = owner_of(work_dir)
    with storage_errors("looking into the work directory", work_dir):
        # the catalog last: a layer that is committed meanwhile has its entry after its directory
        rooms = {room: _names(os.path.join(work_dir, room)) for room in ROOMS}
        keeps_its_layers = bool(rooms["layers"]) and is_read_only(os.path.join(work_dir, "layers"))
        facts, facts_damage = _read_facts(work_dir)
        paths = LayerPaths(work_dir, guest_work_dir)
        catalog, damage = _read_catalog(work_dir, paths)
    claims = paths.claims(catalog.layers.values())
    facts = standing_facts(facts, rooms["layers"], claims)
    paths.find_moved(catalog.layers.values(), facts, is_made_elsewhere=keeps_its_layers)
    overlay = os.path.join(work_dir, "overlay")
    ours = [name for name in rooms["overlay"] if is_bundle_directory(name)]
    bundles = {
        name: bundle for name in ours if (bundle := read_bundle_file(os.path.join(overlay, name), READY))
    }
    unreadable = [
        name for name in ours if name not in bundles and os.path.lexists(os.path.join(overlay, name, READY))
    ]
    rest = [name for name in _names(work_dir) if name not in _KNOWN_FILES]
    set_aside = [name for name in rest if name.startswith(_SET_ASIDE)]
    half_written = [name for name in rest if name.removesuffix(TEMPORARY) in _KNOWN_FILES]
    half_written += [
        f"images/{name}"
        for name in rooms["images"]
        if name.endswith(TEMPORARY) and image_id_of(name.removesuffix(TEMPORARY)) is not None
    ]
    return Inventory(
        work_dir=work_dir,
        owner=owner,
        damage=damage,
        facts_damage=facts_damage,
        catalog=catalog,
        facts=facts,
        paths=paths,
        layer_directories=rooms["layers"],
        keeps_its_layers=keeps_its_layers,
        records=rooms["records"],
        images=rooms["images"],
        staging=rooms["staging"],
        bundles=bundles,
        unfinished=_without(ours, bundles, unreadable),
        unreadable=tuple(unreadable),
        # image-rs gives its overlays running numbers
        strange=tuple(name for name in rooms["overlay"] if name not in ours and not name.isdecimal()),
        set_aside=tuple(set_aside),
        half_written=tuple(half_written),
        unknown=_without(rest, set_aside, half_written),
    )


def _read_catalog(work_dir: str, paths: LayerPaths) -> tuple[Catalog, str]:
    try:
        catalog = Catalog.read(work_dir, paths.misplaced)
    except Unreadable as error:
        return Catalog(), str(error)
    if catalog is None and has_copies(work_dir):
        return Catalog(), "it is gone, but there are copies of what it said"
    return catalog or Catalog(), ""


def _read_facts(work_dir: str) -> tuple[dict[str, LayerFacts], str]:
    try:
        return read_facts(work_dir)[0], ""
    except NoFile as error:
        return {}, str(error)


def _names(directory: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(directory)))
    except FileNotFoundError:
        return ()


def _without(names: Iterable[str], *others: Iterable[str]) -> tuple[str, ...]:
    left_out = {name for other in others for name in other}
    return tuple(name for name in names if name not in left_out)
