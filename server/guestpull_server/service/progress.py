"""What PullImageWithProgress streams while a pull runs.

The pull's threads tell a `PullEvents`, and never wait for the client; the event loop takes the events out. A
client that reads slowly costs little memory: of a layer's progress only the latest is kept, and all else comes
once a layer.
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
    """A PullObserver for threads, whose observations the event loop iterates over, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock = threading.Lock()
        self._steps: list[pb.PullImageEvent] = []
        self._progress: dict[Digest, pb.PullImageEvent] = {}

    async def until(self, ended: asyncio.Future[Any]) -> AsyncIterator[pb.PullImageEvent]:
        """Yield the events until the pull has ended, those included that came before its end."""
        ended.add_done_callback(lambda _: self._news.set())
        while True:
            await self._news.wait()
            is_last = ended.done()
            self._news.clear()
            with self._lock:
                ready = [*self._steps, *self._progress.values()]
                self._steps.clear()
                self._progress.clear()
            for event in ready:
                yield event
            if is_last:
                return

    def resolved(self, image: ResolvedImage) -> None:
        """The reference is resolved."""
        self._add(messages.resolved_event(image))

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """So many bytes of a layer have come."""
        event = messages.progress_event(layer, done_bytes)
        with self._lock:
            is_first = not (self._steps or self._progress)
            self._progress[layer.blob.digest] = event
        if is_first:
            self._tell()

    def layer_done(self, layer: PulledLayer) -> None:
        """A layer is in the store; its progress is no longer of interest."""
        with self._lock:
            self._progress.pop(layer.compressed_digest, None)
        self._add(messages.layer_done_event(layer))

    def mounted(self, rootfs_path: str) -> None:
        """The root filesystem is mounted."""
        self._add(pb.PullImageEvent(mounted=pb.Mounted(rootfs_path=rootfs_path)))

    def _add(self, event: pb.PullImageEvent) -> None:
        with self._lock:
            self._steps.append(event)
        self._tell()

    def _tell(self) -> None:
        self._loop.call_soon_threadsafe(self._news.set)
