"""Everything in a work directory, sorted by what it belongs to: the input of audit and gc. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server import config
from guestpull_server.errors import InvalidDigest, InvalidStore, storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import layer_metadata
from guestpull_server.store import meta_store as meta_stores
from guestpull_server.store.bundle_making import READY, BundleFile, is_bundle_directory, read_bundle_file
from guestpull_server.store.durability import TEMPORARY
from guestpull_server.store.filesystem import is_directory
from guestpull_server.store.image_backups import backups_except, image_id_of
from guestpull_server.store.layer_metadata import LayerMetadata
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.meta_store import MetaStore
from guestpull_server.store.survey import Survey, names_in, survey
from guestpull_server.store.workdir import DIRECTORIES, LOCK, TAR_SPLIT_SUFFIX, owner_of

_KNOWN_NAMES: Final = frozenset(
    {LOCK, meta_stores.FILE_NAME, layer_metadata.OLD_FILE_NAME, config.FILE_NAME, "lost+found", *DIRECTORIES}
)
_SET_ASIDE: Final = tuple(
    f"{name}.corrupt-" for name in (meta_stores.FILE_NAME, layer_metadata.OLD_FILE_NAME)
)
_RECORD_SUFFIXES: Final = (TAR_SPLIT_SUFFIX, layer_metadata.SUFFIX)


@dataclass(frozen=True, slots=True)
class Inventory:
    """A work directory at one moment. Names are relative to the directory that the attribute is about.

    Attributes:
        work_dir: the work directory.
        owner: the process that owns it and may change it meanwhile, or None.
        survey: meta_store.json and the metadata of layers.
        staging: the names in staging/.
        bundles: the bundles that are ready, by the names of their directories in overlay/.
        unfinished: directories in overlay/ of bundles that a pull was making.
        unreadable: directories in overlay/ of bundles whose bundle.json cannot be read.
        strange: names in overlay/ that are neither ours nor image-rs's.
        set_aside: damaged files that an earlier start renamed.
        half_written: files that were being written, as paths in the work directory.
        unknown: other names in the work directory.
    """

    work_dir: str
    owner: str | None
    survey: Survey
    staging: tuple[str, ...]
    bundles: dict[str, BundleFile]
    unfinished: tuple[str, ...]
    unreadable: tuple[str, ...]
    strange: tuple[str, ...]
    set_aside: tuple[str, ...]
    half_written: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def meta_store(self) -> MetaStore:
        """The content of meta_store.json; empty if it is missing or damaged."""
        return self.survey.meta_store

    @property
    def damage(self) -> str:
        """Why meta_store.json cannot be read, or ""."""
        return self.survey.damage

    @property
    def metadata(self) -> dict[str, LayerMetadata]:
        """The metadata of layers whose directories exist, by compressed digest."""
        return self.survey.metadata

    @property
    def paths(self) -> LayerPaths:
        """Where the layers are."""
        return self.survey.paths

    def path(self, *names: str) -> str:
        """Return the path of something in the work directory."""
        return os.path.join(self.work_dir, *names)

    def directory_of(self, layer: StoredLayer) -> str | None:
        """Return a layer's name in layers/, or None if it lies in another store."""
        if not self.paths.is_ours(layer):
            return None
        return os.path.basename(self.paths.local(layer))

    def users_of_layers(self) -> dict[Digest, list[Digest]]:
        """Return the images that have each layer."""
        users: dict[Digest, list[Digest]] = {}
        for record in self.meta_store.images.values():
            for layer in dict.fromkeys(record.layers):
                users.setdefault(layer.compressed_digest, []).append(record.image_id)
        return users

    def layers_without_entry(self) -> list[LayerMetadata]:
        """Return the metadata of layers that were committed, but have no entry in meta_store.json."""
        if self.damage:
            return []
        named: frozenset[str] = frozenset(self.meta_store.layers)
        claims = self.paths.claims(self.meta_store.layers.values())
        return [
            metadata
            for digest, metadata in sorted(self.metadata.items())
            if digest not in named and metadata.directory not in claims
        ]

    def unused_layers(self) -> list[StoredLayer]:
        """Return the layers that no image and no bundle uses, and that are in this work directory or missing."""
        used = {layer.compressed_digest for one in self.meta_store.images.values() for layer in one.layers}
        used.update(Digest(layer) for bundle in self.bundles.values() for layer in bundle.layers)
        known = dict(self.meta_store.layers)
        for metadata in self.layers_without_entry():  # opening the store restores their entries
            with suppress(InvalidDigest):
                layer = metadata.layer(self.paths.written(metadata.directory))
                known[layer.compressed_digest] = layer
        can_go = not self.survey.keeps_its_layers
        return [
            layer
            for digest, layer in sorted(known.items())
            if digest not in used
            and ((can_go and self.paths.is_ours(layer)) or not is_directory(self.paths.local(layer)))
        ]

    def unclaimed_paths(self) -> list[str]:
        """Return the paths of everything that belongs to no layer and no image, and of half-written files."""
        half_written = [self.path(name) for name in self.half_written]
        return [*self.strays(), *self.orphans(), *self.foreign(), *half_written]

    def strays(self) -> list[str]:
        """Return the paths in layers/ that belong to no layer and can be deleted.

        If there are unusable entries, nobody knows what they refer to, and nothing is a stray.
        """
        if self.damage or self.meta_store.unusable or self.survey.keeps_its_layers:
            return []
        claimed = {self.directory_of(layer) for layer in self.meta_store.layers.values()}
        claimed |= {metadata.directory for metadata in self.metadata.values()}
        claimed |= {Digest(text).directory_name for bundle in self.bundles.values() for text in bundle.layers}
        return [self.path("layers", name) for name in self.survey.layer_directories if name not in claimed]

    def orphans(self) -> list[str]:
        """Return the paths of metadata and tar-splits without a layer, and of backups without an image."""
        strays = frozenset(self.strays())
        directories = {
            name for name in self.survey.layer_directories if self.path("layers", name) not in strays
        }
        useless = {*self.survey.unused_metadata(), *(name for name, _ in self.survey.files.damaged)}
        orphans = [
            self.path("records", name)
            for name in self.survey.records
            if name in useless
            or (name.endswith(_RECORD_SUFFIXES) and os.path.splitext(name)[0] not in directories)
        ]
        if self.damage:
            return orphans
        return orphans + [
            self.path("images", name)
            for name in self.survey.images
            if (image_id := image_id_of(name)) is not None and self.meta_store.image_entry(image_id) is None
        ]

    def foreign(self) -> list[str]:
        """Return the paths of files in records/ and images/ that are not ours."""
        half_written = frozenset(self.half_written)
        foreign = [
            f"records/{name}" for name in self.survey.records if not name.endswith(_RECORD_SUFFIXES)
        ] + [f"images/{name}" for name in self.survey.images if image_id_of(name) is None]
        return [self.path(name) for name in foreign if name not in half_written]


def take_inventory(work_dir: str, guest_work_dir: str | None = None) -> Inventory:
    """Read everything in a work directory but the layers themselves.

    Args:
        work_dir: the work directory.
        guest_work_dir: the same directory in the guest; None if the path is the same.

    Raises:
        InvalidStore: the directory does not exist.
        StorageFailed: the operating system refuses.
    """
    work_dir = os.path.abspath(work_dir)
    if not os.path.isdir(work_dir):
        raise InvalidStore(work_dir, "it is not a directory")
    owner = owner_of(work_dir)
    overlay = os.path.join(work_dir, "overlay")
    with storage_errors("reading the work directory", work_dir):
        staging = names_in(os.path.join(work_dir, "staging"))
        overlays = names_in(overlay)
        found = survey(work_dir, LayerPaths(work_dir, guest_work_dir))
    found.find_moved(is_made_elsewhere=found.keeps_its_layers)
    ours = [name for name in overlays if is_bundle_directory(name)]
    bundles = {
        name: bundle for name in ours if (bundle := read_bundle_file(os.path.join(overlay, name), READY))
    }
    unreadable = [
        name for name in ours if name not in bundles and os.path.lexists(os.path.join(overlay, name, READY))
    ]
    rest = [name for name in names_in(work_dir) if name not in _KNOWN_NAMES]
    set_aside = [name for name in rest if name.startswith(_SET_ASIDE)]
    half_written = [name for name in rest if name.removesuffix(TEMPORARY) in _KNOWN_NAMES]
    half_written += [
        f"images/{name}"
        for name in found.images
        if name.endswith(TEMPORARY) and image_id_of(name.removesuffix(TEMPORARY)) is not None
    ]
    half_written += [
        f"records/{name}" for name in found.records if name.endswith(layer_metadata.SUFFIX + TEMPORARY)
    ]
    return Inventory(
        work_dir=work_dir,
        owner=owner,
        survey=found,
        staging=staging,
        bundles=bundles,
        unfinished=_without(ours, bundles, unreadable),
        unreadable=tuple(unreadable),
        # image-rs names its overlays by running numbers
        strange=tuple(name for name in overlays if name not in ours and not name.isdecimal()),
        set_aside=tuple(set_aside),
        half_written=tuple(half_written),
        unknown=_without(rest, set_aside, half_written),
    )


def _without(names: Iterable[str], *others: Iterable[str]) -> tuple[str, ...]:
    left_out = {name for other in others for name in other}
    return tuple(name for name in names if name not in left_out)


# -- the path in the guest ----------------------------------------------------------------------------------


def guest_work_dirs(work_dir: str) -> tuple[str, ...]:
    """Return the work directories that the entries of the layers point into; none if there are no layers.

    For example, all entries point into /var/lib/store after the first command, so those of B's layers must as
    well:

        bake --work-dir build/store --guest-work-dir /var/lib/store A
        bake --work-dir build/store B

    A daemon does not ask: it serves the store where it is, wherever it was copied from.

    Raises:
        StorageFailed: the operating system refuses.
    """
    work_dir = os.path.abspath(work_dir)
    if not os.path.isdir(work_dir):
        return ()
    inventory = take_inventory(work_dir)
    layers = list(inventory.meta_store.layers.values())
    if inventory.damage:  # the backups of its images contain the paths as well
        with storage_errors("reading the backups of images", work_dir), suppress(FileNotFoundError):
            layers = [layer for record, _ in backups_except(work_dir, ()) for layer in record.layers]
        inventory.paths.find_moved(
            layers, inventory.metadata, is_made_elsewhere=inventory.survey.keeps_its_layers
        )
    ours = [layer.store_path for layer in layers if inventory.paths.is_ours(layer)]
    found = {os.path.dirname(os.path.dirname(os.path.normpath(path))) for path in ours}
    if {os.path.realpath(place) for place in found} == {os.path.realpath(work_dir)} and len(found) > 1:
        return (work_dir,)  # several names of it, through links
    return tuple(sorted(found))


def likely_guest_work_dir(work_dir: str) -> str | None:
    """Return the path of a work directory in the guest, if all entries agree on one that differs from this path.

    Raises:
        StorageFailed: the operating system refuses.
    """
    found = guest_work_dirs(work_dir)
    return found[0] if len(found) == 1 and found[0] != os.path.abspath(work_dir) else None
