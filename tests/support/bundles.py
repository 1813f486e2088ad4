"""Bundles without a store: a rootfs mounted where a test says, and its config.json."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from guestpull_server.bundle import write_runtime_config
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.models import StoredLayer
from guestpull_server.snapshot import mount_rootfs


def mount_layers(
    layers: Sequence[StoredLayer],
    overlay: Path | str,
    rootfs: Path | str,
    cancellation: Cancellation | None = None,
) -> None:
    """Mount layers, bottom-most first; `overlay` and `rootfs` are empty directories."""
    with _opened(os.path.dirname(rootfs)) as directory:
        mount_rootfs(layers, str(overlay), str(rootfs), directory, cancellation or Cancellation("the pull"))


def write_config(
    bundle: Path | str,
    config: bytes,
    written: Callable[[os.stat_result], None] = lambda _status: None,
    *,
    limits: Limits | None = None,
    cancellation: Cancellation | None = None,
) -> None:
    """Write a bundle's config.json from an image config; its rootfs is in it."""
    with _opened(bundle) as directory:
        write_runtime_config(
            str(bundle),
            f"{bundle}/rootfs",
            config,
            directory,
            written,
            limits or Limits(),
            cancellation or Cancellation("the pull"),
        )


class CancelledAtCheck(Cancellation):
    """A cancellation whose nth check raises."""

    def __init__(self, number: int) -> None:
        super().__init__("the pull")
        self._checks_left = number

    def check(self) -> None:
        """Count, and leave in time."""
        self._checks_left -= 1
        if self._checks_left == 0:
            self.cancel()
        super().check()


@contextmanager
def _opened(directory: Path | str) -> Iterator[int]:
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
