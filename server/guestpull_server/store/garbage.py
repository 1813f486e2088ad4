"""Delete what nothing refers to: `guestpulld gc`.

    staging/*          leftovers of pulls and deletions that a crash interrupted
    overlay/<id>       of bundles whose pull was interrupted
    layers/<name>      layers that no image and no bundle uses; directories that belong to no layer
    records/*          of layers that no longer exist; files that are not ours
    images/*           of images that no longer exist; files that are not ours

Files that were set aside because they were damaged are kept: somebody may want to look at them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from guestpull_server.errors import WorkDirInUse, storage_errors
from guestpull_server.store.bundle_making import Mounts
from guestpull_server.store.filesystem import tree_bytes
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.meta_store import FILE_NAME
from guestpull_server.store.store import Store


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that nothing refers to: its path, what it is, and the size of its files in bytes."""

    path: str
    what: str
    size_bytes: int


def collect_garbage(
    work_dir: str,
    mounts: Mounts,
    *,
    guest_work_dir: str | None = None,
    dry_run: bool = False,
    warn: Callable[[Iterable[str]], object] = list,
) -> tuple[Garbage, ...]:
    """Delete what nothing refers to; return what was, or with `dry_run` would be, deleted.

    `warn` is called with reasons why garbage may not be found, and with what was repaired; a sentence each.

    Raises:
        InvalidStore: the directory does not exist.
        WorkDirInUse: a process owns it.
        StorageFailed: the operating system refuses.
    """
    inventory = take_inventory(work_dir, guest_work_dir)
    if inventory.owner is not None:
        raise WorkDirInUse(inventory.work_dir, inventory.owner)
    found = (*_leftovers(inventory), *_unused(inventory))
    if dry_run:
        warn(_doubts(inventory))
        return found
    store = Store.open(work_dir, mounts, guest_work_dir=guest_work_dir)  # deletes the leftovers
    try:
        warn(store.warnings)
        store.delete_unused(layer.compressed_digest for layer in inventory.unused_layers())
        # something may have an owner after the repairs; whatever became garbage only now is left to the next run
        strays = frozenset(take_inventory(work_dir, guest_work_dir).strays())
        claimed = frozenset(inventory.strays()) - strays
        for path in inventory.unclaimed_paths():
            if path not in claimed and os.path.lexists(path):
                store.delete_stray(path)
    finally:
        store.close()
    return tuple(one for one in found if not os.path.lexists(one.path))


def _doubts(inventory: Inventory) -> Iterator[str]:
    """Yield why some garbage may not be found."""
    path = inventory.path(FILE_NAME)
    unknown = "cannot tell what in layers/ belongs to nothing. Run `guestpulld verify`"
    if inventory.damage:
        yield f"{path} is damaged ({inventory.damage}): {unknown}"
    elif inventory.meta_store.unusable:
        yield f"{path}: {inventory.meta_store.unusable[0]}: {unknown}"


def _leftovers(inventory: Inventory) -> tuple[Garbage, ...]:
    return (
        *(_garbage(inventory.path("staging", name), "left by a crash") for name in inventory.staging),
        *(_garbage(inventory.path(name), "half written") for name in inventory.half_written),
        *(
            _garbage(inventory.path("overlay", name), "of a bundle that was not finished")
            for name in inventory.unfinished
        ),
    )


def _unused(inventory: Inventory) -> tuple[Garbage, ...]:
    return (
        *(
            _garbage(
                inventory.paths.local(layer),
                f"layer {layer.compressed_digest}, which no image and no bundle uses",
            )
            for layer in inventory.unused_layers()
        ),
        *(_garbage(path, "belongs to no layer") for path in inventory.strays()),
        *(_garbage(path, "describes something that no longer exists") for path in inventory.orphans()),
        *(_garbage(path, "is not a file of this service") for path in inventory.foreign()),
    )


def _garbage(path: str, what: str) -> Garbage:
    with storage_errors("measuring what nothing refers to", path):
        return Garbage(path, what, tree_bytes(path) if os.path.lexists(path) else 0)
