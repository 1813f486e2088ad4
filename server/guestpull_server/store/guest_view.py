"""Where a store's guest sees it, by what is written in it: for who works on a baked store, and was not told.

    bake --work-dir build/store --guest-work-dir /var/lib/store A     # all entries say /var/lib/store/layers/…
    bake --work-dir build/store B                                     # so must those of B's layers

A daemon does not ask: the store that it serves is where it is, wherever it was copied from.
"""

from __future__ import annotations

import os
from contextlib import suppress

from guestpull_server.errors import storage_errors
from guestpull_server.store.copies import copies_of_others
from guestpull_server.store.inventory import take_inventory


def guest_work_dirs(work_dir: str) -> tuple[str, ...]:
    """Where the entries of the layers in a work directory say that it is; none: there are none, or no layers.

    Raises:
        StorageFailed: the operating system refuses.
    """
    work_dir = os.path.abspath(work_dir)
    if not os.path.isdir(work_dir):
        return ()
    inventory = take_inventory(work_dir)
    layers = list(inventory.catalog.layers.values())
    if inventory.damage:  # the copies of its images' entries say it as well
        with storage_errors("reading the copies of images", work_dir), suppress(FileNotFoundError):
            layers = [layer for record, _ in copies_of_others(work_dir, ()) for layer in record.layers]
        inventory.paths.find_moved(layers, inventory.facts, is_made_elsewhere=inventory.keeps_its_layers)
    ours = [layer.store_path for layer in layers if inventory.paths.is_ours(layer)]
    told = {os.path.dirname(os.path.dirname(os.path.normpath(path))) for path in ours}
    if {os.path.realpath(place) for place in told} == {os.path.realpath(work_dir)} and len(told) > 1:
        return (work_dir,)  # by several names, which links give it
    return tuple(sorted(told))


def likely_guest_work_dir(work_dir: str) -> str | None:
    """Where the guest sees a work directory, if all entries say the same, and another place than this.

    Raises:
        StorageFailed: the operating system refuses.
    """
    told = guest_work_dirs(work_dir)
    return told[0] if len(told) == 1 and told[0] != os.path.abspath(work_dir) else None
