"""What there is to prove a work directory's images and layers by: configs, records, facts.

An image's id is the digest of its config, and the config has the layers' diff_ids; a layer's record and directory
make a tar of that diff_id. What another program made has less: image-rs writes configs anew, and keeps no records.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.copies import ProvedImage, prove_image
from guestpull_server.store.entries import ImageRecord
from guestpull_server.store.facts import LayerFacts, facts_beside, with_facts
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.paths import is_directory
from guestpull_server.store.workdir import RECORD_SUFFIX


@dataclass(frozen=True, slots=True)
class LayerEvidence:
    """A layer that is there.

    Attributes:
        layer: with its path as it is here, and its facts, if there are any.
        record: whatever has the name of its record; None if nothing has.
        images: those that have it.
    """

    layer: StoredLayer
    record: str | None
    images: tuple[Digest, ...]

    @property
    def has_facts(self) -> bool:
        """Whether layer_facts.jsonl tells of it: we unpacked it, and kept a record."""
        return self.layer.size_bytes >= 0


@dataclass(frozen=True, slots=True)
class ImageEvidence:
    """An image.

    Attributes:
        record: what meta_store.json says of it.
        proved: what its id proves; None if nothing here has the digest that it is.
        layers: the entries in layer_db of its layers, bottom-most first, as far as there are any.
    """

    record: ImageRecord
    proved: ProvedImage | None
    layers: tuple[StoredLayer, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of a work directory; its path, the images, and the layers that are there."""

    work_dir: str
    images: tuple[ImageEvidence, ...]
    layers: tuple[LayerEvidence, ...]


def gather_evidence(work_dir: str, guest_work_dir: str | None = None) -> Evidence:
    """See what there is. Nothing is proved yet but configs, which is cheap.

    Raises:
        InvalidStore: there is no such directory.
        StorageFailed: the operating system refuses.
    """
    inventory = take_inventory(work_dir, guest_work_dir)
    known = inventory.catalog.layers
    images = [
        ImageEvidence(
            record,
            prove_image(inventory.work_dir, image_id, record.config),
            tuple(
                known[one.compressed_digest]
                for one in dict.fromkeys(record.layers)
                if one.compressed_digest in known
            ),
        )
        for image_id, record in sorted(inventory.catalog.images.items())
    ]
    return Evidence(inventory.work_dir, tuple(images), tuple(_layers(inventory)))


def _layers(inventory: Inventory) -> list[LayerEvidence]:
    users = inventory.users_of_layers()
    # read again: a daemon may have added a layer after the inventory had read them
    own_facts = facts_beside(inventory.work_dir)
    facts_of_stores = {inventory.work_dir: own_facts}
    found: list[LayerEvidence] = []
    for digest, layer in sorted(inventory.catalog.layers.items()):
        path = inventory.paths.local(layer)
        if not is_directory(path):
            continue
        store = os.path.dirname(os.path.dirname(path))
        facts = own_facts.get(digest) or _foreign_facts(facts_of_stores, store, digest)
        here = with_facts(dataclasses.replace(layer, store_path=path), facts)
        record = os.path.join(store, "records", os.path.basename(path) + RECORD_SUFFIX)
        found.append(
            LayerEvidence(here, record if os.path.lexists(record) else None, tuple(users.get(digest, ())))
        )
    return found


def _foreign_facts(known: dict[str, dict[str, LayerFacts]], store: str, digest: Digest) -> LayerFacts | None:
    if store not in known:
        known[store] = facts_beside(store)
    return known[store].get(digest)
