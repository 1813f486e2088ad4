"""One layer, one download: callers that want the same layer at the same time share it.

A download is a thread that fetches a layer, has a worker unpack it, and commits it to the store. It belongs to no
caller: one that leaves, or whose pull fails elsewhere, does not affect the others. When the last waiter leaves,
the download stops and what it wrote is deleted.

    fetch(layer) ---- joins or starts ----> download: registry -> layer worker -> store

A download uses the credentials of the caller that started it. A failure that these credentials or that caller's
registry caused does not count for the other waiters: they start a download of their own. A failure that the layer
itself or this machine caused counts for all of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from guestpull_server.fair_semaphore import FairSemaphore
from guestpull_server.layer import LayerWorker, LayerWorkers
from guestpull_server.models import Digest, LayerDescriptor, MiB, StoredLayer
from guestpull_server.registry import BlobStream, ImageSource
from guestpull_server.store import Store

_log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int], None]
"""Called with the compressed bytes that a download has received so far, from the download's thread."""

_PIECE_BYTES: Final = 1 * MiB
_SECONDS_BETWEEN_PROGRESS: Final = 0.1
_OF_THE_CALLER: Final = frozenset(
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
    """A layer that is in the store now. `downloaded_bytes` is 0 for a caller that joined a download."""

    layer: StoredLayer
    downloaded_bytes: int


class _Waiter:
    """A caller that waits for a download."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.woken = threading.Event()


class _Download:
    """One download under way. The lock of `SharedDownloads` guards what changes."""

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
    def key(self) -> tuple[Digest, Digest]:
        """Both digests: who expects another diff_id of the same blob must not share the verdict."""
        return self.layer.blob.digest, self.layer.diff_id


class SharedDownloads:
    """All downloads of layers that are under way. Thread-safe."""

    def __init__(self, store: Store, workers: LayerWorkers, limits: Limits) -> None:
        self._store = store
        self._workers = workers
        self._semaphore = FairSemaphore(limits.max_concurrent_layers)
        self._lock = threading.Lock()
        self._under_way: dict[tuple[Digest, Digest], _Download] = {}

    def fetch(
        self, layer: LayerDescriptor, source: ImageSource, cancellation: Cancellation, progress: Progress
    ) -> FetchedLayer:
        """Download, unpack, verify and commit a layer; return when it is in the store.

        When this raises, nothing of the download is left, unless others still wait for it.

        Raises:
            GuestpullError: what the registry, layer and store rooms raise; Cancelled and DeadlineExceeded
                when this caller left.
        """
        while True:
            cancellation.check()
            waiter = _Waiter(progress)
            download, started = self._join(layer, source, cancellation.request, waiter)
            withdraw = cancellation.on_cancel(waiter.woken.set)
            waiter.woken.wait(cancellation.remaining())
            withdraw()
            self._leave(download, waiter)
            if download.fetched is not None:
                return download.fetched if started else FetchedLayer(download.fetched.layer, 0)
            cancellation.check()
            assert download.error is not None
            if started or _concerns_others(download.error, download.source, source):
                raise download.error
            stored = self._store.layer(layer.blob.digest)
            if stored is not None:
                return FetchedLayer(stored, 0)

    # -- joining and leaving --------------------------------------------------------------------------------

    def _join(
        self, layer: LayerDescriptor, source: ImageSource, request: str, waiter: _Waiter
    ) -> tuple[_Download, bool]:
        """The download for a layer, and whether this caller started it."""
        download = _Download(layer, source, request)
        with self._lock:
            started = download.key not in self._under_way
            download = self._under_way.setdefault(download.key, download)
            download.waiters.append(waiter)
        if started:
            name = f"download {layer.blob.digest[:19]}"
            try:
                threading.Thread(target=self._run, args=(download,), name=name, daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                download.error = WorkerFailed(layer.blob.digest, f"cannot be started, because {error}")
                self._end(download)
        return download, started

    def _leave(self, download: _Download, waiter: _Waiter) -> None:
        with self._lock:
            download.waiters.remove(waiter)
            abandoned = not download.waiters and not download.ended.is_set()
            if abandoned:
                del self._under_way[download.key]
        if abandoned:
            download.cancellation.cancel()
            download.ended.wait()

    def _end(self, download: _Download) -> None:
        with self._lock:
            if self._under_way.get(download.key) is download:
                del self._under_way[download.key]
            download.ended.set()
            for waiter in download.waiters:
                waiter.woken.set()

    # -- the download itself --------------------------------------------------------------------------------

    def _run(self, download: _Download) -> None:
        try:
            with self._semaphore.acquire(download.cancellation):
                download.fetched = self._download_and_retry_once(download)
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits, whatever it is
            download.error = error
        finally:
            self._end(download)

    def _download_and_retry_once(self, download: _Download) -> FetchedLayer:
        def attempt() -> FetchedLayer:
            return self._store.with_room(lambda: self._download(download))

        try:
            return attempt()
        except (DigestMismatch, SizeMismatch):
            # a proxy or a disk may have altered it once; twice is the registry's last word
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
                tar_split_path=staged.record_path,
            ) as worker,
        ):
            withdraw = download.cancellation.on_cancel(worker.kill)
            try:
                self._feed(download, stream, worker)
                unpacked = worker.finish()
            except (CorruptLayer, LimitExceeded):
                # altered bytes rarely unpack: what the registry sent decides which error is the true one
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
            told = {
                "request": download.request,
                "layer": blob.digest,
                "image": download.source.reference,
                "bytes": stream.received_bytes,
                "unpacked_bytes": unpacked.size_bytes,
                "entries": unpacked.entries,
                "seconds": round(time.monotonic() - started, 3),
            }
            _log.info("layer", extra={"facts": told})
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


def _concerns_others(error: Exception, theirs: ImageSource, ours: ImageSource) -> bool:
    """Whether the failure of a download that another caller started counts for this caller too."""
    if not isinstance(error, GuestpullError):
        return True
    if error.status in _OF_THE_CALLER:
        return False
    return error.status is not Status.UNAVAILABLE or _host(theirs) == _host(ours)


def _host(source: ImageSource) -> str:
    return source.reference.partition("/")[0]
