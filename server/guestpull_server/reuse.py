"""Whether a layer that is there already may be trusted: `verify_reuse` of the configuration.

A layer of ours that was altered is deleted, so that it is downloaded again; one of another store is refused,
because nothing is written there. A layer without a record (image-rs's) is checked as far as it can be.
"""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from guestpull_server.config import VerifyReuse
from guestpull_server.errors import LayerChanged
from guestpull_server.layer import LayerWorkers, verify_unrecorded
from guestpull_server.models import Cancellation, Digest, ResolvedImage, StoredLayer
from guestpull_server.store import Store

_log = logging.getLogger(__name__)


class ReuseCheck:
    """Checks layers before they are reused. Thread-safe."""

    def __init__(self, store: Store, mode: VerifyReuse, workers: LayerWorkers) -> None:
        self._store = store
        self._mode = mode
        self._workers = workers
        self._lock = threading.Lock()
        self._verified: set[tuple[Digest, int, int, int]] = set()

    def discard_changed(self, resolved: ResolvedImage, cancellation: Cancellation) -> None:
        """Check the layers of an image that the store has, side by side; those that were altered are deleted.

        Raises:
            LayerChanged: such a layer lies in another store.
            LayerInUse: such a layer is mounted, or a pull needs it.
            Cancelled: the caller left.
            DeadlineExceeded: its time ran out.
        """
        if self._mode is VerifyReuse.NEVER:
            return
        layers = self._present(resolved)
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify") as pool:
            outcomes = list(pool.map(lambda layer: self._problem(layer, cancellation), layers))
        changed = [(layer, problem) for layer, problem in zip(layers, outcomes, strict=True) if problem]
        for layer, problem in changed:
            told = {"layer": layer.compressed_digest, "path": layer.store_path, "change": problem}
            _log.warning("a layer was altered", extra={"facts": told})
            if self._store.is_read_only(layer):
                raise LayerChanged(layer.compressed_digest, layer.store_path, problem)
            self._store.discard_layer(layer.compressed_digest)

    def _present(self, resolved: ResolvedImage) -> list[StoredLayer]:
        found: dict[Digest, StoredLayer] = {}
        for layer in resolved.layers:
            stored = self._store.layer(layer.blob.digest)
            if stored is not None and stored.uncompressed_digest == layer.diff_id:
                found[layer.blob.digest] = stored
        return list(found.values())

    def _problem(self, layer: StoredLayer, cancellation: Cancellation) -> str:
        """What is wrong with a layer; empty if nothing is."""
        key = _identity(layer)
        with self._lock:
            if self._mode is VerifyReuse.MOUNT and key in self._verified:
                return ""
        record = self._store.record_of(layer)
        if record is None:
            findings = verify_unrecorded(layer.store_path, cancellation=cancellation)
        else:
            findings = self._workers.verify(layer.store_path, record, layer.uncompressed_digest, cancellation)
        if findings:
            return str(findings[0])
        with self._lock:
            self._verified.add(key)
        return ""


def _identity(layer: StoredLayer) -> tuple[Digest, int, int, int]:
    """What tells that a directory is still the one that was verified, short of looking into it."""
    status = os.stat(layer.store_path)
    return layer.uncompressed_digest, status.st_dev, status.st_ino, status.st_ctime_ns
