"""`guestpulld gc`: deletes what nothing refers to, in a work directory that no daemon serves.

This implements the command; cli.py parses its options and prints the result.
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
    """The result of `gc`: what it deleted or, with `dry_run`, would delete."""

    work_dir: str
    dry_run: bool
    garbage: tuple[Garbage, ...]

    def lines(self) -> Iterator[str]:
        """Render the result for people."""
        verb = "would delete" if self.dry_run else "deleted"
        for garbage in self.garbage:
            yield f"{verb} {garbage.path}: {garbage.what} ({garbage.size_bytes / 1e6:.1f} MB)"
        total = sum(garbage.size_bytes for garbage in self.garbage)
        yield f"{verb} {len(self.garbage)} things, {total / 1e6:.1f} MB"


def collect(
    configuration: Configuration, *, guest_work_dir: str | None, dry_run: bool, warn: Warn
) -> Collected:
    """Delete everything that no image and no bundle refers to.

    Raises:
        InvalidStore: the directory does not exist.
        WorkDirInUse: a daemon serves it.
        StorageFailed: the operating system reported an error.
    """
    work_dir, mounts = configuration.work_dir, OverlayMounts()
    guest_work_dir = guest_work_dir or likely_guest_work_dir(work_dir)
    garbage = collect_garbage(work_dir, mounts, guest_work_dir=guest_work_dir, dry_run=True, warn=warn)
    if garbage and not dry_run:  # do not write anything if there is no garbage
        tidy = is_tidy(work_dir)
        garbage = collect_garbage(work_dir, mounts, guest_work_dir=guest_work_dir, warn=warn)
        if tidy:
            Store.open(work_dir, mounts, guest_work_dir=guest_work_dir).close(tidy=True)
    return Collected(work_dir, dry_run, garbage)
