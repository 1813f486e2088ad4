"""A bar per layer on standard error while a pull runs; nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from guestpull_client.errors import Internal
from guestpull_client.models import LayerDone, LayerProgress, Mounted, PulledImage, PullEvent, Resolved
from guestpull_client.text import abbreviated


def follow(events: Iterable[PullEvent]) -> PulledImage:
    """Show the events of a pull; returns its result.

    Raises:
        GuestpullError: the pull failed.
    """
    bars = _Bars()
    with bars.progress:
        for event in events:
            match event:
                case Resolved():
                    for layer in event.layers:
                        bars.bar_of(layer.compressed_digest, layer.size_bytes)
                case LayerProgress():
                    bar = bars.bar_of(event.compressed_digest, event.total_bytes)
                    bars.progress.update(bar, completed=event.done_bytes, total=event.total_bytes)
                case LayerDone():
                    bars.finish(event)
                case Mounted():
                    pass
                case PulledImage():
                    return event
    raise Internal("the service ended the pull's events before its result. Its log says more.")


class _Bars:
    """The bars, by their layers' digests. A layer that occurs twice in an image has one."""

    def __init__(self) -> None:
        self._bars: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.fields[layer]}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )

    def bar_of(self, digest: str, total_bytes: int) -> TaskID:
        """The bar of a layer, made where there is none yet; a total of 0 is one that is not known."""
        if digest not in self._bars:
            self._bars[digest] = self.progress.add_task(
                "", total=total_bytes or None, layer=abbreviated(digest)
            )
        return self._bars[digest]

    def finish(self, event: LayerDone) -> None:
        """Fill a layer's bar."""
        bar = self.bar_of(event.compressed_digest, event.downloaded_bytes)
        total = next(task.total for task in self.progress.tasks if task.id == bar) or 1
        self.progress.update(
            bar, total=total, completed=total, description="was there" if event.reused else "done"
        )
