"""How layers go: out of sight first, then deleted."""

from __future__ import annotations

import os
from collections.abc import Callable

from guestpull_server.errors import storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.durability import remove_tree
from guestpull_server.store.workdir import WorkDir


class Deletion:
    """Layers of ours on their way out: first out of sight, under the store's lock, then deleted, without it."""

    def __init__(self, work_dir: WorkDir, going: tuple[StoredLayer, ...]) -> None:
        self.layers: tuple[Digest, ...] = ()
        self._work_dir = work_dir
        self._going = going
        self._aside: list[str] = []
        self._freed_bytes = 0

    def set_aside(self, local_path: Callable[[StoredLayer], str]) -> None:
        """Rename the directories and records into staging/; harmless to repeat."""
        with storage_errors("deleting layers", self._work_dir.layers):
            for layer in self._going:
                path = local_path(layer)
                if os.path.lexists(path):
                    self._aside.append(self._work_dir.set_aside(path))
                    self.layers += (layer.compressed_digest,)
                record = os.path.join(self._work_dir.records, os.path.basename(path))
                if os.path.lexists(record):
                    self._aside.append(self._work_dir.set_aside(record))

    def delete(self) -> int:
        """Delete what was set aside; returns the bytes of all files that were deleted so far."""
        with storage_errors("deleting layers", self._work_dir.staging):
            while self._aside:
                self._freed_bytes += remove_tree(self._aside.pop())
        return self._freed_bytes
