"""All layers of one image: those that the store has, and those that must be downloaded, a few at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import DigestMismatch, WorkerFailed
from guestpull_server.models import Digest, LayerDescriptor, PulledLayer, ResolvedImage, StoredLayer
from guestpull_server.registry import ImageSource
from guestpull_server.requests import PullObserver
from guestpull_server.shared_downloads import SharedDownloads
from guestpull_server.store import Store


class LayerFetcher:
    """Brings images' layers into the store. Thread-safe.

    Args:
        store: where layers are, and come to.
        downloads: shared by all who want the same layer.
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
        """All layers of an image, bottom-most first, as the store has them and as they were come by.

        Raises:
            DigestMismatch: the image says of one blob that it is several layers.
            GuestpullError: what the first download to fail raised; the others have ended when this does.
        """
        fetched: dict[Digest, tuple[StoredLayer, PulledLayer]] = {}
        missing: dict[Digest, LayerDescriptor] = {}
        for layer in resolved.layers:
            if layer.blob.digest in fetched or layer.blob.digest in missing:
                continue
            stored = self._store.layer(layer.blob.digest)
            if stored is None or stored.uncompressed_digest != layer.diff_id:
                # where they differ, the store's entry or the image lies: the blob tells which
                missing[layer.blob.digest] = layer
            else:
                fetched[layer.blob.digest] = stored, _reused(stored)
                observer.layer_done(fetched[layer.blob.digest][1])
        if missing:
            fetched |= self._download(missing.values(), source, cancellation, observer)
        for layer in resolved.layers:
            actual = fetched[layer.blob.digest][0].uncompressed_digest
            if layer.diff_id != actual:  # a blob that occurs again, with another diff_id than the first time
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
        """Download layers, a few at once; the first failure stops the others, and is raised at their end."""
        lock = threading.Lock()

        def download(layer: LayerDescriptor) -> tuple[StoredLayer, PulledLayer]:
            def progress(done_bytes: int) -> None:
                with lock:
                    observer.layer_progress(layer, done_bytes)

            fetched = self._downloads.fetch(layer, source, stop, progress)
            pulled = PulledLayer(
                layer.blob.digest,
                layer.diff_id,
                reused=fetched.downloaded_bytes == 0,
                downloaded_bytes=fetched.downloaded_bytes,
            )
            with lock:
                observer.layer_done(pulled)
            return fetched.layer, pulled

        with (
            cancellation.nested() as stop,
            ThreadPoolExecutor(self._at_once, thread_name_prefix="layers") as pool,
        ):
            downloads: dict[Digest, Future[tuple[StoredLayer, PulledLayer]]] = {}
            try:
                for layer in missing:
                    downloads[layer.blob.digest] = _submitted(pool, download, layer)
                done, _ = wait(downloads.values(), return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()
            except BaseException:
                stop.cancel()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            return {digest: one.result() for digest, one in downloads.items()}


def _submitted(
    pool: ThreadPoolExecutor,
    download: Callable[[LayerDescriptor], tuple[StoredLayer, PulledLayer]],
    layer: LayerDescriptor,
) -> Future[tuple[StoredLayer, PulledLayer]]:
    try:
        return pool.submit(download, layer)
    except (RuntimeError, MemoryError) as error:
        raise WorkerFailed(layer.blob.digest, f"cannot be started, because {error}") from None


def _reused(stored: StoredLayer) -> PulledLayer:
    return PulledLayer(stored.compressed_digest, stored.uncompressed_digest, reused=True, downloaded_bytes=0)
