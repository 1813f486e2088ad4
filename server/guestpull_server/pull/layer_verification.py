"""Verifies layers that are in the store before they are reused: `verify_reuse` of the configuration.

A layer that was altered is deleted, so that it is downloaded again. If it is in a read-only store, the request
fails instead. If a copy in another store replaces a deleted layer, the copy is verified as well. A layer that we
unpacked has a tar-split file and metadata; if one of them is missing, the layer cannot be verified and counts as
altered. A layer that has neither (image-rs's) is inspected as far as possible.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import VerifyReuse
from guestpull_server.errors import LayerChanged, StorageFailed, WorkerFailed
from guestpull_server.layer import LayerWorkers, implied_fingerprint, inspect_layer
from guestpull_server.models import Digest, ResolvedImage, StoredLayer
from guestpull_server.store import Store

Verified: TypeAlias = frozenset[str] | None
"""The store_paths of the verified layers. None if the configuration does not require verification."""

_Identity: TypeAlias = tuple[Digest, int, int, int]

_log = logging.getLogger(__name__)


class LayerVerification:
    """Verifies layers before they are reused. Thread-safe."""

    def __init__(self, store: Store, mode: VerifyReuse, workers: LayerWorkers) -> None:
        self._store = store
        self._mode = mode
        self._workers = workers
        self._lock = threading.Lock()
        self._discarding = threading.Lock()
        self._verified: set[_Identity] = set()

    def discard_changed(self, resolved: ResolvedImage, cancellation: Cancellation) -> Verified:
        """Verify the layers of an image that are in the store, in parallel, and delete those that were altered.

        Return the verified layers that remain. None if the configuration does not require verification.

        Raises:
            LayerChanged: an altered layer is in a read-only store.
            LayerInUse: an altered layer is mounted, or a pull needs it.
            Cancelled: the caller left.
            DeadlineExceeded: the caller's time ran out.
        """
        if self._mode is VerifyReuse.NEVER:
            return None
        verified: set[str] = set()
        while layers := self._unverified(resolved, verified):
            identities = [_identity(layer) for layer in layers]
            with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="verify") as pool:
                problems = list(self._problems(pool, layers, identities, cancellation))
            for layer, identity, problem in zip(layers, identities, problems, strict=True):
                if problem:
                    self._discard(layer, identity, problem)
                elif identity is not None:
                    verified.add(layer.store_path)
        return frozenset(verified)

    def covers(self, resolved: ResolvedImage, verified: Verified) -> bool:
        """Return whether all layers of an image that are in the store now are among the verified ones."""
        return verified is None or not self._unverified(resolved, verified)

    def _discard(self, layer: StoredLayer, identity: _Identity | None, problem: str) -> None:
        """Delete a layer, unless another thread has deleted or replaced it meanwhile."""
        with self._discarding:
            if _identity(layer) != identity:
                return
            fields = {"layer": layer.compressed_digest, "path": layer.store_path, "change": problem}
            _log.warning("a layer was altered", extra={"fields": fields})
            if self._store.is_read_only(layer):
                raise LayerChanged(layer.compressed_digest, layer.store_path, problem)
            self._store.discard_layer(layer.compressed_digest)

    def _unverified(self, resolved: ResolvedImage, verified: Collection[str]) -> list[StoredLayer]:
        return [layer for layer in self._present(resolved) if layer.store_path not in verified]

    def _present(self, resolved: ResolvedImage) -> list[StoredLayer]:
        present: dict[Digest, StoredLayer] = {}
        for layer in resolved.layers:
            stored = self._store.layer(layer.blob.digest)
            if stored is not None and stored.uncompressed_digest == layer.diff_id:
                present[layer.blob.digest] = stored
        return list(present.values())

    def _problems(
        self,
        pool: ThreadPoolExecutor,
        layers: Sequence[StoredLayer],
        identities: Sequence[_Identity | None],
        cancellation: Cancellation,
    ) -> Iterator[str]:
        try:
            return pool.map(partial(self._problem, cancellation=cancellation), layers, identities)
        except (RuntimeError, MemoryError) as error:
            pool.shutdown(cancel_futures=True)
            raise WorkerFailed(layers[0].compressed_digest, f"cannot be started, because {error}") from None

    def _problem(self, layer: StoredLayer, identity: _Identity | None, cancellation: Cancellation) -> str:
        """Return how a layer was altered. Empty if it was not, or if it was deleted."""
        if identity is None:
            return ""
        with self._lock:
            if self._mode is VerifyReuse.MOUNT and identity in self._verified:
                return ""
        try:
            problem = self._alteration(layer, cancellation)
        except StorageFailed as error:
            if _identity(layer) == identity:
                raise
            return error.explain()
        if not problem:
            with self._lock:
                self._verified.add(identity)
        return problem

    def _alteration(self, layer: StoredLayer, cancellation: Cancellation) -> str:
        tar_split, has_metadata = self._store.tar_split_of(layer), layer.size_bytes >= 0
        if tar_split is None and has_metadata:
            return "its tar-split is missing"
        if tar_split is not None and not has_metadata:
            return "its metadata is missing"
        if tar_split is None:
            findings = inspect_layer(layer.store_path, cancellation=cancellation)
        else:
            implied = implied_fingerprint(layer.implied_directories)
            findings = self._workers.verify(
                layer.store_path, tar_split, layer.uncompressed_digest, cancellation, implied=implied
            )
        return str(findings[0]) if findings else ""


def _identity(layer: StoredLayer) -> _Identity | None:
    """Identify a layer's directory without reading its content. Return None if it does not exist."""
    try:
        status = os.lstat(layer.store_path)
    except FileNotFoundError:
        return None
    return layer.uncompressed_digest, status.st_dev, status.st_ino, status.st_ctime_ns
