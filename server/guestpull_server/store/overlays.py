"""What an overlay between us and the disk spoils: in a work directory, and in a store that is only read.

Overlayfs hides the whiteouts and opaque directories of the layers below it, so that what a layer deletes comes
back, unseen; it takes no new whiteouts, and no upper directories. A guest's root filesystem often is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from guestpull_server.errors import storage_errors
from guestpull_server.models import StoredLayer
from guestpull_server.store.filesystems import is_overlay
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.workdir import rooms_of

WORK_DIR_SPOILED: Final = (
    "lies on overlayfs, which takes no whiteouts and no upper directories, and hides the whiteouts of what is "
    "below it: layers that delete files are unpacked or shown wrong, and bundles cannot be mounted"
)
WORK_DIR_REMEDY: Final = (
    "Use a work directory on tmpfs, and name what lies here in additional_stores, by where its own image "
    "is mounted"
)
STORE_SPOILED: Final = (
    "it lies on overlayfs, which hides the whiteouts and opaque directories of what is below it, so that a wrong "
    "rootfs would be mounted. Mount the image that holds the store, or bind-mount what is below the overlay, at"
)


def overlay_below(places: Iterable[str]) -> str | None:
    """The first of some directories that lies on an overlay; those that are not there do not count.

    Raises:
        StorageFailed: the operating system refuses.
    """
    for place in dict.fromkeys(places):
        with storage_errors("asking for the file system", place):
            if os.path.isdir(place) and is_overlay(place):
                return place
    return None


def overlay_in(work_dir: str, paths: LayerPaths, layers: Iterable[StoredLayer]) -> str | None:
    """A directory of a work directory, or one that its layers lie in, that is on an overlay.

    Raises:
        StorageFailed: the operating system refuses.
    """
    return overlay_below((*rooms_of(work_dir), *(os.path.dirname(paths.local(layer)) for layer in layers)))
