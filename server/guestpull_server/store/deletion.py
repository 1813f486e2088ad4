"""How layers go: out of sight first, then deleted."""

from __future__ import annotations

import os
from collections.abc import Sequence

from guestpull_server.errors import storage_errors
from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.durability import Durability
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.trees import remove_tree
from guestpull_server.store.workdir import WorkDir


class Deletion:
    """Layers of ours on their way out: first out of sight, under the store's lock, then deleted, without it."""

    def __init__(
        self, work_dir: WorkDir, durability: Durability, paths: LayerPaths, going: Sequence[StoredLayer]
    ) -> None:
        self.layers: tuple[Digest, ...] = ()
        """The layers whose directories were there, and go."""
        self._work_dir = work_dir
        self._durability = durability
        self._going = {layer.compressed_digest: paths.local(layer) for layer in going if paths.is_ours(layer)}
        self._aside: list[str] = []
        self._freed_bytes = 0

    def set_aside(self) -> None:
        """Rename the directories and records into staging/; harmless to repeat."""
        with storage_errors("deleting layers", self._work_dir.layers):
            for digest, path in self._going.items():
                if os.path.lexists(path):
                    self._aside.append(self._work_dir.set_aside(path))
                    self.layers += (digest,)
                record = self._work_dir.record_path(path)
                if os.path.lexists(record):
                    self._aside.append(self._work_dir.set_aside(record))
            if self._aside:
                self._durability.sync_names(self._work_dir.layers)

    def delete(self) -> int:
        """Delete what was set aside; returns the bytes of all files that were deleted so far."""
        with storage_errors("deleting layers", self._work_dir.staging):
            while self._aside:
                self._freed_bytes += remove_tree(self._aside.pop(0))
        return self._freed_bytes
