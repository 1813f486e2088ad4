"""One layer, one download: callers that want the same layer at the same time share a flight.

A flight is a thread that downloads a layer, has a worker unpack it, and commits it to the store. It belongs
to nobody: a caller that leaves, or whose pull fails elsewhere, does not hurt the others; when the last one has
left, the download stops and what it made is deleted.

    fetch(layer) ---- joins or starts ----> flight: registry -> layer worker -> store

A flight uses the credentials of the caller that started it. What fails because of them, or because of that
caller's registry, is no verdict on the others: they start a flight of their own. What fails because of the
layer itself, or of this machine, fails for all of them.
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
"""Called with the compressed bytes that a flight has received so far, from the flight's thread."""

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
"""Failures that say something of who started a flight, and nothing of the layer."""


@dataclass(frozen=True, slots=True)
class FetchedLayer:
    """A layer that is in the store now. `downloaded_bytes` is 0 for whoever joined another's flight."""

    layer: StoredLayer
    downloaded_bytes: int


class _Passenger:
    """A caller that waits for a flight."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.woken = threading.Event()


class _Flight:
    """One download under way. What changes here is guarded by the lock of `Flights`."""

    def __init__(self, layer: LayerDescriptor, source: ImageSource, request: str) -> None:
        self.layer = layer
        self.request = request
        """The id of the request that started it, for the log."""
        self.source = source
        self.cancellation = Cancellation(f"download of layer {layer.blob.digest}")
        self.passengers: list[_Passenger] = []
        self.landed = threading.Event()
        self.fetched: FetchedLayer | None = None
        self.error: Exception | None = None

    @property
    def key(self) -> tuple[Digest, Digest]:
        """Both digests: who expects another diff_id of the same blob must not share the verdict."""
        return self.layer.blob.digest, self.layer.diff_id


class Flights:
    """All downloads of layers that are under way. Thread-safe."""

    def __init__(self, store: Store, workers: LayerWorkers, limits: Limits) -> None:
        self._store = store
        self._workers = workers
        self._semaphore = FairSemaphore(limits.max_concurrent_layers)
        self._lock = threading.Lock()
        self._under_way: dict[tuple[Digest, Digest], _Flight] = {}

    def fetch(
        self, layer: LayerDescriptor, source: ImageSource, cancellation: Cancellation, progress: Progress
    ) -> FetchedLayer:
        """Have a layer downloaded, unpacked, verified and committed; blocks until it is.

        When this raises, nothing of the download is left, unless others still wait for it.

        Raises:
            GuestpullError: what the registry, layer and store rooms raise; Cancelled and DeadlineExceeded
                when this caller left.
        """
        while True:
            cancellation.check()
            passenger = _Passenger(progress)
            flight, started = self._board(layer, source, cancellation.request, passenger)
            withdraw = cancellation.on_cancel(passenger.woken.set)
            passenger.woken.wait(cancellation.remaining())
            withdraw()
            self._leave(flight, passenger)
            if flight.fetched is not None:
                return flight.fetched if started else FetchedLayer(flight.fetched.layer, 0)
            cancellation.check()
            assert flight.error is not None
            if started or _concerns_others(flight.error, flight.source, source):
                raise flight.error
            stored = self._store.layer(layer.blob.digest)
            if stored is not None:
                return FetchedLayer(stored, 0)

    # -- boarding and leaving -------------------------------------------------------------------------------

    def _board(
        self, layer: LayerDescriptor, source: ImageSource, request: str, passenger: _Passenger
    ) -> tuple[_Flight, bool]:
        """The flight for a layer, and whether this caller started it."""
        flight = _Flight(layer, source, request)
        with self._lock:
            started = flight.key not in self._under_way
            flight = self._under_way.setdefault(flight.key, flight)
            flight.passengers.append(passenger)
        if started:
            name = f"flight {layer.blob.digest[:19]}"
            try:
                threading.Thread(target=self._fly, args=(flight,), name=name, daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                flight.error = WorkerFailed(layer.blob.digest, f"cannot be started, because {error}")
                self._land(flight)
        return flight, started

    def _leave(self, flight: _Flight, passenger: _Passenger) -> None:
        with self._lock:
            flight.passengers.remove(passenger)
            abandoned = not flight.passengers and not flight.landed.is_set()
            if abandoned:
                del self._under_way[flight.key]
        if abandoned:
            flight.cancellation.cancel()
            flight.landed.wait()

    def _land(self, flight: _Flight) -> None:
        with self._lock:
            if self._under_way.get(flight.key) is flight:
                del self._under_way[flight.key]
            flight.landed.set()
            for passenger in flight.passengers:
                passenger.woken.set()

    # -- the flight itself ----------------------------------------------------------------------------------

    def _fly(self, flight: _Flight) -> None:
        try:
            with self._semaphore.acquire(flight.cancellation):
                flight.fetched = self._download_and_retry_once(flight)
        except Exception as error:  # noqa: BLE001 - handed on to whoever waits, whatever it is
            flight.error = error
        finally:
            self._land(flight)

    def _download_and_retry_once(self, flight: _Flight) -> FetchedLayer:
        try:
            return self._download(flight)
        except (DigestMismatch, SizeMismatch):
            # a proxy or a disk may have altered it once; twice is the registry's last word
            return self._download(flight)

    def _download(self, flight: _Flight) -> FetchedLayer:
        blob, diff_id = flight.layer.blob, flight.layer.diff_id
        started = time.monotonic()
        with (
            self._store.stage(blob.digest) as staged,
            flight.source.open_blob(blob, flight.cancellation) as stream,
            self._workers.unpack(
                staged.directory,
                diff_id.algorithm,
                blob.digest,
                checked_digest=blob.digest,
                tar_split_path=staged.record_path,
            ) as worker,
        ):
            withdraw = flight.cancellation.on_cancel(worker.kill)
            try:
                self._feed(flight, stream, worker)
                unpacked = worker.finish()
            except (CorruptLayer, LimitExceeded):
                # altered bytes rarely unpack: what the registry sent decides which error is the true one
                _drain(stream)
                raise
            except WorkerFailed:
                flight.cancellation.check()
                raise
            finally:
                withdraw()
            if unpacked.diff_id != diff_id:
                raise DigestMismatch("diff_id of layer", diff_id, unpacked.diff_id, f"blob {blob.digest}")
            flight.cancellation.check()
            stored = self._store.commit_layer(staged, blob.digest, unpacked)
            told = {
                "request": flight.request,
                "layer": blob.digest,
                "image": flight.source.reference,
                "bytes": stream.received_bytes,
                "unpacked_bytes": unpacked.size_bytes,
                "entries": unpacked.entries,
                "seconds": round(time.monotonic() - started, 3),
            }
            _log.info("layer", extra={"facts": told})
            return FetchedLayer(stored, stream.received_bytes)

    @staticmethod
    def _feed(flight: _Flight, stream: BlobStream, worker: LayerWorker) -> None:
        next_report = 0.0
        while piece := stream.read(_PIECE_BYTES):
            worker.write(memoryview(piece))
            now = time.monotonic()
            if now >= next_report:
                next_report = now + _SECONDS_BETWEEN_PROGRESS
                for passenger in tuple(flight.passengers):
                    passenger.progress(stream.received_bytes)


def _drain(stream: BlobStream) -> None:
    while stream.read(_PIECE_BYTES):
        pass


def _concerns_others(error: Exception, theirs: ImageSource, ours: ImageSource) -> bool:
    """Whether a flight that another caller started failed for a reason that holds for us as well."""
    if not isinstance(error, GuestpullError):
        return True
    if error.status in _OF_THE_CALLER:
        return False
    return error.status is not Status.UNAVAILABLE or _host(theirs) == _host(ours)


def _host(source: ImageSource) -> str:
    return source.reference.partition("/")[0]
