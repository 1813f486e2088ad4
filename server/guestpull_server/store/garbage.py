"""What nothing refers to, and its end: `guestpulld gc`.

    staging/*          leftovers of pulls and deletions that a crash interrupted
    overlay/<id>       of bundles that a pull was making when it was interrupted
    layers/<name>      layers that no image and no bundle uses; directories that belong to no layer
    records/*          of layers that are gone; what is no record
    images/*           of images that are gone; what is no copy of one

What was set aside because it was damaged is not garbage: somebody may want to look at it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from guestpull_server.errors import WorkDirInUse, storage_errors
from guestpull_server.store.bundle_making import Mounts
from guestpull_server.store.catalog import FILE_NAME
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.outcomes import Garbage
from guestpull_server.store.store import Store
from guestpull_server.store.trees import tree_bytes
from guestpull_server.store.unreferenced import unclaimed_paths, unused_layers


def collect_garbage(
    work_dir: str,
    mounts: Mounts,
    *,
    guest_work_dir: str | None = None,
    dry_run: bool = False,
    warn: Callable[[Iterable[str]], object] = list,
) -> tuple[Garbage, ...]:
    """Delete what nothing refers to; returns what was, or with `dry_run` would be, deleted.

    `warn` is called with what keeps it from finding all of that, and with what was put right; a sentence each.

    Raises:
        InvalidStore: there is no such directory.
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
        store.delete_unused(layer.compressed_digest for layer in unused_layers(inventory))
        # what opening put right may belong to something now; what belongs to nothing only now is for the next time
        strays = frozenset(take_inventory(work_dir, guest_work_dir).strays())
        belonging = frozenset(inventory.strays()) - strays
        for path in unclaimed_paths(inventory):
            if path not in belonging and os.path.lexists(path):
                store.delete_stray(path)
    finally:
        store.close()
    return tuple(one for one in found if not os.path.lexists(one.path))


def _doubts(inventory: Inventory) -> Iterator[str]:
    """Why not all that is of no use is found."""
    path = inventory.path(FILE_NAME)
    untold = "what in layers/ belongs to nothing cannot be told. Run `guestpulld verify`"
    if inventory.damage:
        yield f"{path} is damaged ({inventory.damage}): {untold}"
    elif inventory.catalog.unusable:
        yield f"{path}: {inventory.catalog.unusable[0]}: {untold}"


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
            for layer in unused_layers(inventory)
        ),
        *(_garbage(path, "belongs to no layer") for path in inventory.strays()),
        *(_garbage(path, "what it tells of is gone") for path in inventory.orphans()),
        *(_garbage(path, "is none of ours") for path in inventory.foreign()),
    )


def _garbage(path: str, what: str) -> Garbage:
    with storage_errors("measuring what nothing refers to", path):
        return Garbage(path, what, tree_bytes(path) if os.path.lexists(path) else 0)
