"""A store that is only read: one of `additional_stores`, in the guest's rootfs or on a shared file system.

Nothing is written to it, not even a lock. It was made by us (`guestpulld bake`) or by image-rs, possibly at
another path, where there may be another store by now. So a layer is looked for in the store's own layers/ first,
under the name that its store_path ends with, and then at its store_path.
"""

from __future__ import annotations

import dataclasses
import os

from guestpull_server.errors import InvalidStore
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store import meta_store
from guestpull_server.store.entries import ImageRecord
from guestpull_server.store.filesystem import OVERLAY_BELOW_STORE, is_directory, overlay_below
from guestpull_server.store.image_names import ImageNames
from guestpull_server.store.layer_metadata import with_metadata
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.survey import collector_paused, survey


class ReadOnlyStore:
    """The images and layers of another store, with their paths on this machine."""

    def __init__(self, work_dir: str) -> None:
        """Read the store.

        Raises:
            InvalidStore: meta_store.json is missing or cannot be read, or the layers lie on an overlay.
        """
        self.work_dir = os.path.normpath(work_dir)
        path = os.path.join(self.work_dir, meta_store.FILE_NAME)
        try:
            with collector_paused():
                found = survey(self.work_dir, LayerPaths(self.work_dir))
        except OSError as error:
            raise InvalidStore(path, error.strerror or str(error)) from None
        if found.is_missing:
            raise InvalidStore(path, "it does not exist")
        if found.damage:
            raise InvalidStore(path, f"it cannot be read: {found.damage}")
        found.find_moved(is_made_elsewhere=True)
        self.layers = {
            digest: with_metadata(found.paths.localised(layer), found.metadata.get(digest))
            for digest, layer in found.meta_store.layers.items()
        }
        self.images = {
            image_id: dataclasses.replace(
                record, layers=tuple(self._known(found.paths.localised(layer)) for layer in record.layers)
            )
            for image_id, record in found.meta_store.images.items()
        }
        self.names = ImageNames(self.images)
        overlay = overlay_below(os.path.dirname(layer.store_path) for layer in self.layers.values())
        if overlay is not None:
            raise InvalidStore(overlay, f"{OVERLAY_BELOW_STORE} {self.work_dir}")

    def layer(self, digest: Digest) -> StoredLayer | None:
        """Return a layer that has an entry and a directory, or None."""
        found = self.layers.get(digest)
        return found if found is not None and is_directory(found.store_path) else None

    def covers(self, image_id: Digest, manifest_digest: Digest, reference: str) -> ImageRecord | None:
        """Return an image if it is complete and has this manifest and name; it need not be recorded again then.

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

    def _known(self, layer: StoredLayer) -> StoredLayer:
        known = self.layers.get(layer.compressed_digest, layer)
        return known if known.uncompressed_digest == layer.uncompressed_digest else layer
