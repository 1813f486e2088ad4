"""One layer, one download: callers that want the same layer at the same time share it.

A download is a thread that fetches a layer, has a worker unpack it, and commits it to the store. It belongs to no
caller: one that leaves, or whose pull fails elsewhere, does not affect the others. When the last waiter leaves,
the download stops and what it wrote is deleted.

    fetch(layers) ---- join or start ----> download: registry -> layer worker -> store

Callers share the download of a layer if they ask the same registry for it. A layer that several registries are
asked for comes from the first that has sent all of it: its waiters and those of the others are served, and the
other downloads stop. A download that waits for its turn costs no thread; the registries share the turns.

A download uses the credentials of the caller that started it. A failure that these credentials caused does not
count for the other waiters: they start a download of their own. A failure that the layer, the registry or this
machine caused counts for all of them.
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
    """A layer that is in the store now. `downloaded_bytes` is 0 for a caller that did not start its download."""

    layer: StoredLayer
    downloaded_bytes: int


class _Download:
    """A download that is under way or waits for its turn. The lock of `SharedDownloads` guards what changes."""

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
        """The key of its turn."""
        return self.source.registry


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A caller that waits for a download. It is put into `ended` once the download has ended."""

    download: _Download
    started: bool
    progress: Progress
    ended: SimpleQueue[_Waiter | None]


class SharedDownloads:
    """All downloads of layers that are under way. Thread-safe."""

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
        """Download, unpack, verify and commit layers; yield each when it is in the store.

        When this raises or is closed, nothing of the downloads is left, unless others still wait for them.

        Args:
            layers: what to fetch, in this order.
            source: where from.
            cancellation: of the caller.
            progress: told of each layer's compressed bytes so far, from the downloads' threads.
            at_once: how many layers to wait for at the same time.

        Raises:
            GuestpullError: what the registry, layer and store rooms raise, of the first download to fail;
                Cancelled and DeadlineExceeded when this caller left.
        """
        left = deque(layers)
        joined: set[_Waiter] = set()
        ended: SimpleQueue[_Waiter | None] = SimpleQueue()
        withdraw = cancellation.on_cancel(lambda: ended.put(None))
        try:
            while left or joined:
                while left and len(joined) < at_once:
                    layer = left.popleft()
                    found = self._join(layer, source, cancellation.request, partial(progress, layer), ended)
                    if isinstance(found, _Waiter):
                        joined.add(found)
                    else:
                        yield found
                if joined:
                    waiter = _next(ended, cancellation)
                    joined.remove(waiter)
                    fetched = _outcome(waiter)
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
        """Join the download of a layer, or start it; the layer itself if a download has just ended."""
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

    # -- the life of a download -----------------------------------------------------------------------------

    def _start_downloads(self) -> None:
        """Start the downloads whose turn it is."""
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
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits, whatever it is
            download.error = error
            self._end(download)
        else:
            self._end(download, fetched)
        self._start_downloads()

    def _end(self, download: _Download, fetched: FetchedLayer | None = None) -> None:
        """Give the turn back and serve the waiters; a layer that was fetched serves those of others too."""
        with self._lock:
            self._turns.give_back(download.registry)
            self._forget(download)
            superseded = list(self._under_way.get(_key(download.layer), {}).values()) if fetched else []
            if fetched is not None:
                download.fetched = fetched
                for other in superseded:
                    other.fetched = FetchedLayer(fetched.layer, 0)
                    self._stop(other)
            self._serve(download)
        for other in superseded:
            other.cancellation.cancel()

    def _stop(self, download: _Download) -> None:
        """Have nobody join a download any more, and end it if it waits for its turn. Others must cancel it."""
        self._forget(download)
        if self._turns.remove(download.registry, download):
            self._serve(download)

    def _forget(self, download: _Download) -> None:
        downloads = self._under_way.get(_key(download.layer), {})
        if downloads.get(download.registry) is download:
            del downloads[download.registry]
            if not downloads:
                del self._under_way[_key(download.layer)]

    @staticmethod
    def _serve(download: _Download) -> None:
        download.ended.set()
        for waiter in download.waiters:
            waiter.ended.put(waiter)

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
                tar_split_path=staged.tar_split_path,
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
            _log.info("layer", extra={"fields": told})
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
    """Both digests: who expects another diff_id of the same blob must not share the outcome."""
    return layer.blob.digest, layer.diff_id


def _next(ended: SimpleQueue[_Waiter | None], cancellation: Cancellation) -> _Waiter:
    """The next waiter whose download ends.

    Raises:
        Cancelled: the caller left.
        DeadlineExceeded: its time ran out.
    """
    with suppress(Empty):
        waiter = ended.get(timeout=cancellation.remaining())
        if waiter is not None:
            return waiter
    cancellation.check()
    raise AssertionError("woken without a download that ended and without a reason")


def _outcome(waiter: _Waiter) -> FetchedLayer | None:
    """What a download came to for one of its waiters; None if another caller's failure does not count for it.

    Raises:
        GuestpullError: the failure.
    """
    download = waiter.download
    if download.fetched is not None:
        return download.fetched if waiter.started else FetchedLayer(download.fetched.layer, 0)
    assert download.error is not None
    error = download.error
    if not waiter.started and isinstance(error, GuestpullError) and error.status in _OF_THE_CALLER:
        return None
    raise error
