"""Shares downloads: callers that want the same layer at the same time wait for the same download.

A download is a thread that fetches a layer, passes it to a worker for unpacking, and commits it to the store. It
is independent of its callers: if one leaves, or its pull fails elsewhere, the others are not affected. When the
last waiter leaves, the download stops, and its files are deleted.

    fetch(layers) ---- join or start ----> download: registry -> layer worker -> store

Callers share the download of a layer if they use the same registry. If callers use several registries for one
layer, the first download to complete serves the waiters of all of them, and the others stop. A download that
waits for its turn does not occupy a thread; the registries share the turns.

A download uses the credentials of the caller that started it. If it fails because of these credentials, the
other waiters start a download of their own. If the layer, the registry or this machine caused the failure, it
counts for all of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    CorruptLayer,
    DigestMismatch,
    GuestpullError,
    LimitExceeded,
    SizeMismatch,
    Status,
    WorkerFailed,
)
from guestpull_server.layer import LayerWorker, LayerWorkers
from guestpull_server.models import Digest, LayerDescriptor, MiB, StoredLayer
from guestpull_server.pull.fair_semaphore import FairQueue, as_many_as_are_free
from guestpull_server.registry import BlobStream, ImageSource
from guestpull_server.store import Store

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int], None]
"""Called with the compressed bytes that a download has received so far, from the download's thread."""

_PIECE_BYTES: Final = 1 * MiB
_SECONDS_BETWEEN_PROGRESS: Final = 0.1
_CALLER_FAILURES: Final = frozenset(
    {
        Status.CANCELLED,
        Status.DEADLINE_EXCEEDED,
        Status.NOT_FOUND,
        Status.PERMISSION_DENIED,
        Status.UNAUTHENTICATED,
    }
)
"""Failures that depend on the caller that started a download, not on the layer."""


@dataclass(frozen=True, slots=True)
class FetchedLayer:
    """A layer that is in the store. `downloaded_bytes` is 0 for a caller that did not start the download."""

    layer: StoredLayer
    downloaded_bytes: int


class _Download:
    """A download that runs or waits for its turn. The lock of `SharedDownloads` guards its mutable state."""

    def __init__(self, layer: LayerDescriptor, source: ImageSource, request: str) -> None:
        self.layer = layer
        self.request = request
        """The id of the request that started it, for the log."""
        self.source = source
        self.cancellation = Cancellation(f"download of layer {layer.blob.digest}")
        self.waiters: list[_Waiter] = []
        self.ended = threading.Event()
        self.fetched: FetchedLayer | None = None
        self.error: Exception | None = None

    @property
    def registry(self) -> str:
        """The key under which it waits for a turn."""
        return self.source.registry


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A caller that waits for a download. When the download has ended, the waiter is put into `ended`."""

    download: _Download
    started: bool
    progress: Progress
    ended: SimpleQueue[_Waiter | None]


class SharedDownloads:
    """All downloads in progress. Thread-safe."""

    def __init__(self, store: Store, workers: LayerWorkers, limits: Limits) -> None:
        self._store = store
        self._workers = workers
        self._lock = threading.Lock()
        self._turns: FairQueue[_Download] = FairQueue(limits.max_concurrent_layers, as_many_as_are_free)
        self._under_way: dict[tuple[Digest, Digest], dict[str, _Download]] = {}

    def fetch(
        self,
        layers: Iterable[LayerDescriptor],
        source: ImageSource,
        cancellation: Cancellation,
        progress: Callable[[LayerDescriptor, int], None],
        *,
        at_once: int,
    ) -> Generator[FetchedLayer, None, None]:
        """Download, unpack, verify and commit layers. Yield each when it is in the store.

        When this raises or is closed, its downloads have stopped, except those that others still wait for.

        Args:
            layers: the layers to fetch, in this order.
            source: has the layers.
            cancellation: of the caller.
            progress: called with a layer and its compressed bytes so far, from the downloads' threads.
            at_once: how many layers to download at the same time.

        Raises:
            GuestpullError: of the first download that failed; Cancelled or DeadlineExceeded if this caller left.
        """
        left = deque(layers)
        joined: set[_Waiter] = set()
        ended: SimpleQueue[_Waiter | None] = SimpleQueue()
        withdraw = cancellation.on_cancel(lambda: ended.put(None))
        try:
            while left or joined:
                while left and len(joined) < at_once:
                    layer = left.popleft()
                    result = self._join(layer, source, cancellation.request, partial(progress, layer), ended)
                    if isinstance(result, _Waiter):
                        joined.add(result)
                    else:
                        yield result
                if joined:
                    waiter = _next(ended, cancellation)
                    joined.remove(waiter)
                    fetched = _result(waiter)
                    if fetched is None:
                        left.appendleft(waiter.download.layer)
                    else:
                        yield fetched
        finally:
            withdraw()
            self._leave(joined)

    # -- joining and leaving --------------------------------------------------------------------------------

    def _join(
        self,
        layer: LayerDescriptor,
        source: ImageSource,
        request: str,
        progress: Progress,
        ended: SimpleQueue[_Waiter | None],
    ) -> _Waiter | FetchedLayer:
        """Join the download of a layer, or start one. Return the layer instead if it is in the store by now."""
        with self._lock:
            download = self._under_way.get(_key(layer), {}).get(source.registry)
            started = download is None
            if download is None:
                stored = self._store.layer(layer.blob.digest)
                if stored is not None and stored.uncompressed_digest == layer.diff_id:
                    return FetchedLayer(stored, 0)
                download = _Download(layer, source, request)
                self._under_way.setdefault(_key(layer), {})[download.registry] = download
                self._turns.put(download.registry, download)
            waiter = _Waiter(download, started, progress, ended)
            download.waiters.append(waiter)
        if started:
            self._start_downloads()
        return waiter

    def _leave(self, waiters: Collection[_Waiter]) -> None:
        abandoned: list[_Download] = []
        with self._lock:
            for waiter in waiters:
                download = waiter.download
                download.waiters.remove(waiter)
                if not download.waiters and not download.ended.is_set():
                    self._stop(download)
                    abandoned.append(download)
        for download in abandoned:
            download.cancellation.cancel()
        for download in abandoned:
            download.ended.wait()

    # -- running a download ---------------------------------------------------------------------------------

    def _start_downloads(self) -> None:
        """Start the downloads that get a turn."""
        while True:
            with self._lock:
                download = self._turns.take()
            if download is None:
                return
            name = f"download {download.layer.blob.digest[:19]}"
            try:
                threading.Thread(target=self._run, args=(download,), name=name, daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                download.error = WorkerFailed(
                    download.layer.blob.digest, f"cannot be started, because {error}"
                )
                self._end(download)

    def _run(self, download: _Download) -> None:
        try:
            fetched = self._download_and_retry_once(download)
        except Exception as error:  # noqa: BLE001 - raised by the waiters
            download.error = error
            self._end(download)
        else:
            self._end(download, fetched)
        self._start_downloads()

    def _end(self, download: _Download, fetched: FetchedLayer | None = None) -> None:
        """Return the turn and wake the waiters. Also end other downloads of the layer if it was fetched."""
        with self._lock:
            self._turns.give_back(download.registry)
            self._forget(download)
            superseded = list(self._under_way.get(_key(download.layer), {}).values()) if fetched else []
            if fetched is not None:
                download.fetched = fetched
                for other in superseded:
                    other.fetched = FetchedLayer(fetched.layer, 0)
                    self._stop(other)
            self._wake(download)
        for other in superseded:
            other.cancellation.cancel()

    def _stop(self, download: _Download) -> None:
        """Accept no more waiters, and end the download if it waits for its turn. The caller must cancel it."""
        self._forget(download)
        if self._turns.remove(download.registry, download):
            self._wake(download)

    def _forget(self, download: _Download) -> None:
        downloads = self._under_way.get(_key(download.layer), {})
        if downloads.get(download.registry) is download:
            del downloads[download.registry]
            if not downloads:
                del self._under_way[_key(download.layer)]

    @staticmethod
    def _wake(download: _Download) -> None:
        download.ended.set()
        for waiter in download.waiters:
            waiter.ended.put(waiter)

    def _download_and_retry_once(self, download: _Download) -> FetchedLayer:
        def attempt() -> FetchedLayer:
            return self._store.with_room(lambda: self._download(download))

        try:
            return attempt()
        except (DigestMismatch, SizeMismatch):
            # a proxy or a disk may have altered the bytes: download again, once
            return attempt()

    def _download(self, download: _Download) -> FetchedLayer:
        blob, diff_id = download.layer.blob, download.layer.diff_id
        started = time.monotonic()
        with (
            self._store.stage(blob.digest) as staged,
            download.source.open_blob(blob, download.cancellation) as stream,
            self._workers.unpack(
                staged.directory,
                diff_id.algorithm,
                blob.digest,
                checked_digest=blob.digest,
                tar_split_path=staged.tar_split_path,
            ) as worker,
        ):
            withdraw = download.cancellation.on_cancel(worker.kill)
            try:
                self._feed(download, stream, worker)
                unpacked = worker.finish()
            except (CorruptLayer, LimitExceeded):
                # altered bytes rarely unpack: read the rest, which raises if the digest differs
                _drain(stream)
                raise
            except WorkerFailed:
                download.cancellation.check()
                raise
            finally:
                withdraw()
            if unpacked.diff_id != diff_id:
                raise DigestMismatch("diff_id of layer", diff_id, unpacked.diff_id, f"blob {blob.digest}")
            download.cancellation.check()
            stored = self._store.commit_layer(staged, blob.digest, unpacked)
            fields = {
                "request": download.request,
                "layer": blob.digest,
                "image": download.source.reference,
                "bytes": stream.received_bytes,
                "unpacked_bytes": unpacked.size_bytes,
                "entries": unpacked.entries,
                "seconds": round(time.monotonic() - started, 3),
            }
            _log.info("layer", extra={"fields": fields})
            return FetchedLayer(stored, stream.received_bytes)

    @staticmethod
    def _feed(download: _Download, stream: BlobStream, worker: LayerWorker) -> None:
        next_report = 0.0
        while piece := stream.read(_PIECE_BYTES):
            worker.write(memoryview(piece))
            now = time.monotonic()
            if now >= next_report:
                next_report = now + _SECONDS_BETWEEN_PROGRESS
                for waiter in tuple(download.waiters):
                    waiter.progress(stream.received_bytes)


def _drain(stream: BlobStream) -> None:
    while stream.read(_PIECE_BYTES):
        pass


def _key(layer: LayerDescriptor) -> tuple[Digest, Digest]:
    """Both digests: a caller that expects another diff_id of the same blob must not share the result."""
    return layer.blob.digest, layer.diff_id


def _next(ended: SimpleQueue[_Waiter | None], cancellation: Cancellation) -> _Waiter:
    """Return the next waiter whose download ends.

    Raises:
        Cancelled: the caller left.
        DeadlineExceeded: the caller's time ran out.
    """
    with suppress(Empty):
        waiter = ended.get(timeout=cancellation.remaining())
        if waiter is not None:
            return waiter
    cancellation.check()
    raise AssertionError("woken without an ended download and without a cancellation")


def _result(waiter: _Waiter) -> FetchedLayer | None:
    """Return the result of a waiter's download, or None if it failed because of another caller.

    Raises:
        GuestpullError: the download failed.
    """
    download = waiter.download
    if download.fetched is not None:
        return download.fetched if waiter.started else FetchedLayer(download.fetched.layer, 0)
    assert download.error is not None
    error = download.error
    if not waiter.started and isinstance(error, GuestpullError) and error.status in _CALLER_FAILURES:
        return None
    raise error
