"""The events that PullImageWithProgress streams while a pull runs.

The pull's threads add events to a `PullEvents` and never wait for the client. The event loop sends the events. A
client that reads slowly takes little memory: only the latest progress of each layer is kept, and all other
events occur at most once a layer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from guestpull_protos import image_service_pb2 as pb
from guestpull_server.models import Digest, LayerDescriptor, PulledLayer, ResolvedImage
from guestpull_server.service import messages


class PullEvents:
    """A PullObserver that passes events from a pull's threads to the event loop, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._has_events = asyncio.Event()
        self._lock = threading.Lock()
        self._steps: list[pb.PullImageEvent] = []
        self._progress: dict[Digest, pb.PullImageEvent] = {}

    async def until(self, ended: asyncio.Future[Any]) -> AsyncIterator[pb.PullImageEvent]:
        """Yield events until the pull has ended, including all that occurred before its end."""
        ended.add_done_callback(lambda _: self._has_events.set())
        while True:
            await self._has_events.wait()
            is_last = ended.done()
            self._has_events.clear()
            with self._lock:
                ready = [*self._steps, *self._progress.values()]
                self._steps.clear()
                self._progress.clear()
            for event in ready:
                yield event
            if is_last:
                return

    def resolved(self, image: ResolvedImage) -> None:
        """Add the event that the reference is resolved."""
        self._add(messages.resolved_event(image))

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """Replace the progress event of a layer."""
        event = messages.progress_event(layer, done_bytes)
        with self._lock:
            is_first = not (self._steps or self._progress)
            self._progress[layer.blob.digest] = event
        if is_first:
            self._wake()

    def layer_done(self, layer: PulledLayer) -> None:
        """Add the event that a layer is in the store, and drop its progress event."""
        with self._lock:
            self._progress.pop(layer.compressed_digest, None)
        self._add(messages.layer_done_event(layer))

    def mounted(self, rootfs_path: str) -> None:
        """Add the event that the root filesystem is mounted."""
        self._add(pb.PullImageEvent(mounted=pb.Mounted(rootfs_path=rootfs_path)))

    def _add(self, event: pb.PullImageEvent) -> None:
        with self._lock:
            self._steps.append(event)
        self._wake()

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._has_events.set)
