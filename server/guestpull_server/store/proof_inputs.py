"""What proves the images and layers of a work directory: configs, tar-splits, metadata.

An image id is the digest of the image's config, which lists the layers' diff_ids. A layer's tar-split and
directory make a tar with that diff_id. Images and layers of other programs have less: image-rs reformats configs,
and keeps no tar-splits.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.entries import ImageRecord
from guestpull_server.store.filesystem import is_directory
from guestpull_server.store.image_backups import ProvedImage, prove_image
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.layer_metadata import LayerMetadata, read_metadata, with_metadata
from guestpull_server.store.workdir import TAR_SPLIT_SUFFIX


@dataclass(frozen=True, slots=True)
class LayerProofInput:
    """A layer whose directory exists.

    Attributes:
        layer: the layer, with its path on this machine and its metadata, if there is any.
        tar_split: the path of its tar-split, whatever is there; None if nothing is.
        images: the images that have the layer.
    """

    layer: StoredLayer
    tar_split: str | None
    images: tuple[Digest, ...]

    @property
    def has_metadata(self) -> bool:
        """Whether there is metadata: we unpacked the layer, and wrote a tar-split."""
        return self.layer.size_bytes >= 0


@dataclass(frozen=True, slots=True)
class ImageProofInput:
    """An image.

    Attributes:
        record: its entry in meta_store.json.
        proved: what the image id proves; None if no config here has that digest.
        layers: those of its layers that have an entry in layer_db, bottom-most first.
    """

    record: ImageRecord
    proved: ProvedImage | None
    layers: tuple[StoredLayer, ...]


@dataclass(frozen=True, slots=True)
class ProofInputs:
    """The images of a work directory, and the layers whose directories exist."""

    work_dir: str
    images: tuple[ImageProofInput, ...]
    layers: tuple[LayerProofInput, ...]


def gather_proof_inputs(work_dir: str, guest_work_dir: str | None = None) -> ProofInputs:
    """Read the proof inputs of a work directory. Proves configs, which is cheap, and nothing else.

    Raises:
        InvalidStore: the directory does not exist.
        StorageFailed: the operating system refuses.
    """
    inventory = take_inventory(work_dir, guest_work_dir)
    known = inventory.meta_store.layers
    images = [
        ImageProofInput(
            record,
            prove_image(inventory.work_dir, image_id, record.config),
            tuple(
                known[one.compressed_digest]
                for one in dict.fromkeys(record.layers)
                if one.compressed_digest in known
            ),
        )
        for image_id, record in sorted(inventory.meta_store.images.items())
    ]
    return ProofInputs(inventory.work_dir, tuple(images), tuple(_layers(inventory)))


def _layers(inventory: Inventory) -> list[LayerProofInput]:
    users = inventory.users_of_layers()
    # read again: a daemon may have added a layer since the inventory read them
    own_metadata = read_metadata(inventory.work_dir).layers
    metadata_of_stores = {inventory.work_dir: own_metadata}
    found: list[LayerProofInput] = []
    for digest, layer in sorted(inventory.meta_store.layers.items()):
        path = inventory.paths.local(layer)
        if not is_directory(path):
            continue
        store = os.path.dirname(os.path.dirname(path))
        metadata = own_metadata.get(digest) or _foreign_metadata(metadata_of_stores, store, digest)
        here = with_metadata(dataclasses.replace(layer, store_path=path), metadata)
        tar_split = os.path.join(store, "records", os.path.basename(path) + TAR_SPLIT_SUFFIX)
        found.append(
            LayerProofInput(
                here, tar_split if os.path.lexists(tar_split) else None, tuple(users.get(digest, ()))
            )
        )
    return found


def _foreign_metadata(
    known: dict[str, dict[str, LayerMetadata]], store: str, digest: Digest
) -> LayerMetadata | None:
    if store not in known:
        known[store] = read_metadata(store).layers
    return known[store].get(digest)
