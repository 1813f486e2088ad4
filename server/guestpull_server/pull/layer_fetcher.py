"""Gets all layers of one image: reuses those in the store, and downloads the others, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import closing

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import DigestMismatch
from guestpull_server.models import Digest, LayerDescriptor, PulledLayer, ResolvedImage, StoredLayer
from guestpull_server.pull.requests import PullObserver
from guestpull_server.pull.shared_downloads import SharedDownloads
from guestpull_server.registry import ImageSource
from guestpull_server.store import Store


class LayerFetcher:
    """Brings images' layers into the store. Thread-safe.

    Args:
        store: holds the layers.
        downloads: shared by all callers that want the same layer.
        at_once: how many layers of one image are downloaded at the same time.
    """

    def __init__(self, store: Store, downloads: SharedDownloads, at_once: int) -> None:
        self._store = store
        self._downloads = downloads
        self._at_once = max(1, at_once)

    def fetch(
        self,
        resolved: ResolvedImage,
        source: ImageSource,
        cancellation: Cancellation,
        observer: PullObserver,
    ) -> tuple[tuple[StoredLayer, ...], tuple[PulledLayer, ...]]:
        """Fetch all layers of an image. Return them bottom-most first, and what was downloaded for each.

        Raises:
            DigestMismatch: the image lists a blob with several diff_ids.
            GuestpullError: of the first download that failed. The others have ended.
        """
        fetched: dict[Digest, tuple[StoredLayer, PulledLayer]] = {}
        missing: dict[Digest, LayerDescriptor] = {}
        for layer in resolved.layers:
            if layer.blob.digest in fetched or layer.blob.digest in missing:
                continue
            stored = self._store.layer(layer.blob.digest)
            if stored is None or stored.uncompressed_digest != layer.diff_id:
                # the diff_ids differ: the entry in the store or the image is wrong, so unpack the blob
                missing[layer.blob.digest] = layer
            else:
                fetched[layer.blob.digest] = stored, _reused(stored)
                observer.layer_done(fetched[layer.blob.digest][1])
        if missing:
            fetched |= self._download(missing.values(), source, cancellation, observer)
        for layer in resolved.layers:
            actual = fetched[layer.blob.digest][0].uncompressed_digest
            if layer.diff_id != actual:  # the image lists the blob twice, with different diff_ids
                raise DigestMismatch("diff_id of layer", layer.diff_id, actual, f"blob {layer.blob.digest}")
        in_order = [fetched[layer.blob.digest] for layer in resolved.layers]
        return tuple(stored for stored, _ in in_order), tuple(pulled for _, pulled in in_order)

    def _download(
        self,
        missing: Iterable[LayerDescriptor],
        source: ImageSource,
        cancellation: Cancellation,
        observer: PullObserver,
    ) -> dict[Digest, tuple[StoredLayer, PulledLayer]]:
        """Download layers, a few at once. If one fails, stop the others, then raise its error."""
        lock = threading.Lock()
        done: dict[Digest, tuple[StoredLayer, PulledLayer]] = {}

        def progress(layer: LayerDescriptor, done_bytes: int) -> None:
            with lock:
                observer.layer_progress(layer, done_bytes)

        downloads = self._downloads.fetch(missing, source, cancellation, progress, at_once=self._at_once)
        with closing(downloads):
            for fetched in downloads:
                layer = fetched.layer
                pulled = PulledLayer(
                    layer.compressed_digest,
                    layer.uncompressed_digest,
                    reused=fetched.downloaded_bytes == 0,
                    downloaded_bytes=fetched.downloaded_bytes,
                )
                with lock:
                    observer.layer_done(pulled)
                done[layer.compressed_digest] = layer, pulled
        return done


def _reused(stored: StoredLayer) -> PulledLayer:
    return PulledLayer(stored.compressed_digest, stored.uncompressed_digest, reused=True, downloaded_bytes=0)
