"""A store that is only read: one of `additional_stores`, in the guest's rootfs or on a shared file system.

Nothing is written there, not even a lock. It was made by us (`guestpulld bake`) or by image-rs; where it is
mounted now may be another place than where it was made, so that a layer is looked for at its store_path first,
and then in the store's own layers/ under the same name.
"""

from __future__ import annotations

import dataclasses
import os

from guestpull_server.errors import InvalidStore
from guestpull_server.models import StoredLayer
from guestpull_server.store import catalog as catalogs
from guestpull_server.store.catalog import Catalog, ImageRecord, Unreadable
from guestpull_server.store.facts import read_facts, with_facts


class ReadOnlyStore:
    """The images and layers of another store, with their paths as they are here."""

    def __init__(self, work_dir: str) -> None:
        """Read it.

        Raises:
            InvalidStore: there is no meta_store.json, or none that can be read.
        """
        self.work_dir = work_dir
        path = os.path.join(work_dir, catalogs.FILE_NAME)
        try:
            with open(path, "rb") as file:
                catalog = Catalog.decode(file.read())
        except OSError as error:
            raise InvalidStore(path, error.strerror or str(error)) from None
        except Unreadable as error:
            raise InvalidStore(path, f"it cannot be read: {error}") from None
        facts, _ = read_facts(work_dir)
        self.layers = {
            digest: with_facts(self._here(layer), facts.get(digest))
            for digest, layer in catalog.layers.items()
        }
        self.images = {
            image_id: ImageRecord(
                record.image_id,
                record.manifest_digest,
                record.references,
                record.config,
                tuple(self.layers.get(layer.compressed_digest, self._here(layer)) for layer in record.layers),
            )
            for image_id, record in catalog.images.items()
        }

    def _here(self, layer: StoredLayer) -> StoredLayer:
        if os.path.isdir(layer.store_path):
            return layer
        moved = os.path.join(self.work_dir, "layers", os.path.basename(layer.store_path))
        return dataclasses.replace(layer, store_path=moved)
