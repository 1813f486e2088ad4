"""A store that is only read: one of `additional_stores`, in the guest's rootfs or on a shared file system.

Nothing is written there, not even a lock. It was made by us (`guestpulld bake`) or by image-rs; where it is
mounted now may be another place than where it was made, and at that place there may be another store by now. So
a layer is looked for in the store's own layers/ first, under the name that its store_path ends with, and then at
its store_path.
"""

from __future__ import annotations

import dataclasses
import os

from guestpull_server.errors import InvalidStore
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import catalog as catalogs
from guestpull_server.store.catalog import Catalog
from guestpull_server.store.entries import ImageRecord, Unreadable
from guestpull_server.store.facts import facts_beside, with_facts
from guestpull_server.store.names import ImageNames
from guestpull_server.store.overlays import STORE_SPOILED, overlay_below
from guestpull_server.store.paths import LayerPaths, is_directory


class ReadOnlyStore:
    """The images and layers of another store, with their paths as they are here."""

    def __init__(self, work_dir: str) -> None:
        """Read it.

        Raises:
            InvalidStore: there is no meta_store.json, or none that can be read; or its layers lie on an overlay.
        """
        self.work_dir = os.path.normpath(work_dir)
        paths = LayerPaths(self.work_dir)
        path = os.path.join(self.work_dir, catalogs.FILE_NAME)
        try:
            catalog = Catalog.read(self.work_dir, paths.misplaced)
        except OSError as error:
            raise InvalidStore(path, error.strerror or str(error)) from None
        except Unreadable as error:
            raise InvalidStore(path, f"it cannot be read: {error}") from None
        if catalog is None:
            raise InvalidStore(path, "there is no such file")
        facts = facts_beside(self.work_dir)
        paths.find_moved(catalog.layers.values(), facts, is_made_elsewhere=True)
        self.layers = {
            digest: with_facts(paths.localised(layer), facts.get(digest))
            for digest, layer in catalog.layers.items()
        }
        self.images = {
            image_id: dataclasses.replace(
                record, layers=tuple(self._as_known(paths.localised(layer)) for layer in record.layers)
            )
            for image_id, record in catalog.images.items()
        }
        self.names = ImageNames(self.images)
        self._refuse_overlays()

    def _refuse_overlays(self) -> None:
        place = overlay_below(os.path.dirname(layer.store_path) for layer in self.layers.values())
        if place is not None:
            raise InvalidStore(place, f"{STORE_SPOILED} {self.work_dir}")

    def layer(self, digest: Digest) -> StoredLayer | None:
        """A layer that can be mounted: it has an entry, and its directory is there."""
        found = self.layers.get(digest)
        return found if found is not None and is_directory(found.store_path) else None

    def covers(self, image_id: Digest, manifest_digest: Digest, reference: str) -> ImageRecord | None:
        """The image, if it is here whole and under that name: then it need not be recorded elsewhere.

        An empty reference stands for any name.
        """
        record = self.images.get(image_id)
        if record is None or manifest_digest not in record.manifest_digests:
            return None
        if any(self.layer(layer.compressed_digest) is None for layer in record.layers):
            return None
        named = (
            not reference or reference in record.references or reference.partition("@")[2] == manifest_digest
        )
        return record if named else None

    def _as_known(self, layer: StoredLayer) -> StoredLayer:
        known = self.layers.get(layer.compressed_digest, layer)
        return known if known.uncompressed_digest == layer.uncompressed_digest else layer
