"""What PullImageWithProgress streams while a pull runs.

The pull runs in a thread and tells a `PullEvents`; the RPC's thread takes the events out. A client that reads
slowly costs no memory: of a layer's progress only the latest is kept.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from guestpull_protos import image_service_pb2 as pb
from guestpull_server.models import Digest, LayerDescriptor, PulledImage, PulledLayer, ResolvedImage
from guestpull_server.requests import PullObserver
from guestpull_server.service import messages


class PullEvents:
    """A PullObserver whose observations can be iterated over, in order, by another thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: deque[pb.PullImageEvent] = deque()
        self._progress: dict[Digest, pb.PullImageEvent] = {}
        self._error: Exception | None = None
        self._ended = False

    def of(self, pull: Callable[[PullObserver], PulledImage]) -> Iterator[pb.PullImageEvent]:
        """Run a pull in a thread; yield its events, the result last.

        Raises:
            GuestpullError: what the pull raised, after its events.
        """
        thread = threading.Thread(target=self._run, args=(pull,), name="pull", daemon=True)
        thread.start()
        try:
            yield from self._events()
        finally:
            thread.join()

    def resolved(self, image: ResolvedImage) -> None:
        """The reference is resolved."""
        self._add(messages.resolved_event(image))

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """So many bytes of a layer have come."""
        with self._changed:
            self._progress[layer.blob.digest] = messages.progress_event(layer, done_bytes)
            self._changed.notify()

    def layer_done(self, layer: PulledLayer) -> None:
        """A layer is there; its progress is no news any more."""
        with self._changed:
            self._progress.pop(layer.compressed_digest, None)
        self._add(messages.layer_done_event(layer))

    def mounted(self, rootfs_path: str) -> None:
        """The root filesystem is mounted."""
        self._add(pb.PullImageEvent(mounted=pb.Mounted(rootfs_path=rootfs_path)))

    def _run(self, pull: Callable[[PullObserver], PulledImage]) -> None:
        try:
            pulled = pull(self)
        except Exception as error:  # noqa: BLE001 - raised again in the RPC's thread
            self._error = error
        else:
            self._add(pb.PullImageEvent(result=messages.pull_response(pulled)))
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _add(self, event: pb.PullImageEvent) -> None:
        with self._changed:
            self._steps.append(event)
            self._changed.notify()

    def _events(self) -> Iterator[pb.PullImageEvent]:
        while True:
            with self._changed:
                while not (self._steps or self._progress or self._ended):
                    self._changed.wait()
                ready = [*self._steps, *self._progress.values()]
                self._steps.clear()
                self._progress.clear()
                ended = self._ended
            yield from ready
            if ended:
                break
        if self._error is not None:
            raise self._error
