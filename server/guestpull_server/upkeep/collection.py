"""`guestpulld gc`: deletes what nothing refers to, in a work directory that no daemon serves.

This is the command without its options and its output. Its result can render itself as lines for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guestpull_server.config import Configuration
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Garbage, Store, collect_garbage, likely_guest_work_dir
from guestpull_server.upkeep.work_dirs import Warn, is_tidy


@dataclass(frozen=True, slots=True)
class Collected:
    """What `gc` deleted, or would delete."""

    work_dir: str
    dry_run: bool
    garbage: tuple[Garbage, ...]

    def lines(self) -> Iterator[str]:
        """Render the result for people."""
        done = "would delete" if self.dry_run else "deleted"
        for one in self.garbage:
            yield f"{done} {one.path}: {one.what} ({one.size_bytes / 1e6:.1f} MB)"
        total = sum(one.size_bytes for one in self.garbage)
        yield f"{done} {len(self.garbage)} things, {total / 1e6:.1f} MB"


def collect(
    configuration: Configuration, *, guest_work_dir: str | None, dry_run: bool, warn: Warn
) -> Collected:
    """Delete what nothing refers to.

    Raises:
        InvalidStore: the directory does not exist.
        WorkDirInUse: a daemon serves it.
        StorageFailed: the operating system refuses.
    """
    work_dir, mounts = configuration.work_dir, OverlayMounts()
    guest_work_dir = guest_work_dir or likely_guest_work_dir(work_dir)
    garbage = collect_garbage(work_dir, mounts, guest_work_dir=guest_work_dir, dry_run=True, warn=warn)
    if garbage and not dry_run:  # without garbage, nothing is written
        tidy = is_tidy(work_dir)
        garbage = collect_garbage(work_dir, mounts, guest_work_dir=guest_work_dir, warn=warn)
        if tidy:
            Store.open(work_dir, mounts, guest_work_dir=guest_work_dir).close(tidy=True)
    return Collected(work_dir, dry_run, garbage)
