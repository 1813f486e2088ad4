"""What nothing refers to in a work directory, found in its inventory."""

from __future__ import annotations

import os
from contextlib import suppress

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import StoredLayer
from guestpull_server.store.inventory import Inventory
from guestpull_server.store.paths import is_directory


def unused_layers(inventory: Inventory) -> list[StoredLayer]:
    """Layers that no image and no bundle uses, and that lie in this work directory or are gone."""
    used = inventory.used_layers()
    known = dict(inventory.catalog.layers)
    for facts in inventory.unwritten_layers():  # opening the store takes them in
        with suppress(InvalidDigest):
            layer = facts.layer(inventory.paths.written(facts.directory))
            known[layer.compressed_digest] = layer
    can_go = not inventory.keeps_its_layers
    return [
        layer
        for digest, layer in sorted(known.items())
        if digest not in used
        and ((can_go and inventory.paths.is_ours(layer)) or not is_directory(inventory.paths.local(layer)))
    ]


def unclaimed_paths(inventory: Inventory) -> list[str]:
    """What belongs to no layer and no image, and what was being written when a crash came."""
    half_written = [inventory.path(name) for name in inventory.half_written]
    return [*inventory.strays(), *inventory.orphans(), *inventory.foreign(), *half_written]


def is_on_its_way_out(path: str) -> bool:
    """Whether a running store is deleting something; see WorkDir.set_aside."""
    return os.path.basename(path).startswith(".")
