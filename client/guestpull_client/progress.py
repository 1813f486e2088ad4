"""A progress bar per layer on standard error during a pull, erased at its end."""

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
    """Show the events of a pull and return its result.

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
    raise Internal("the service ended the progress events without a result. See its log.")


class _Bars:
    """Progress bars by layer digest. A layer that occurs twice in an image has one bar."""

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
        """The bar of a layer, created if missing; a total of 0 means unknown."""
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
            bar, total=total, completed=total, description="reused" if event.reused else "done"
        )
