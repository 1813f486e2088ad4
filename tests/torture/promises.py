"""What callers may rely on, because the daemon said so."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """The known state of a bundle."""

    ABSENT = "absent"
    READY = "ready"
    COMING = "coming"
    """A pull was cancelled, or got no response: the bundle is complete, or it does not exist."""
    LEAVING = "leaving"
    """A release was started, and got no response."""
    TAKEN = "taken"
    """The bundle was unmounted and its directory removed without a call: the daemon releases it soon."""


@dataclass
class BundlePromise:
    """The promise for one path of a bundle.

    Attributes:
        state: the known state.
        image_id: the pulled image, if the state is READY.
        written: the files that its caller wrote to its root, by name.
    """

    state: State = State.ABSENT
    image_id: str = ""
    written: dict[str, bytes] = field(default_factory=dict)


class Promises:
    """The promises for all bundles and images. A bundle's path belongs to one caller; images are shared."""

    def __init__(self) -> None:
        self.bundles: dict[str, BundlePromise] = {}
        self.contested: set[str] = set()
        """Paths that several callers pull into; only their final state can be checked."""
        self._lock = threading.Lock()
        self._present: set[str] = set()
        self._removals: dict[str, int] = {}
        self._removals_under_way: dict[str, int] = {}

    def bundle(self, path: str) -> BundlePromise:
        """Set the state of a path."""
        with self._lock:
            return self.bundles.setdefault(path, BundlePromise())

    def present_images(self) -> frozenset[str]:
        """The images that must be in the store: pulled, and not requested to be removed since."""
        with self._lock:
            return frozenset(self._present)

    @contextmanager
    def removing(self, image_id: str) -> Iterator[None]:
        """Promise nothing about an image during a block, nor after it if it fails."""
        with self._lock:
            self._present.discard(image_id)
            self._removals[image_id] = self._removals.get(image_id, 0) + 1
            self._removals_under_way[image_id] = self._removals_under_way.get(image_id, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._removals_under_way[image_id] -= 1

    def removals(self) -> Mapping[str, int]:
        """The number of removal requests for each image so far; for `pulled`."""
        with self._lock:
            return self._removals | {
                image_id: -1 for image_id, number in self._removals_under_way.items() if number
            }

    def pulled(self, image_id: str, removals_before: Mapping[str, int]) -> None:
        """Record a successful pull; `removals` is the number of removal requests when it started."""
        with self._lock:
            if self._removals.get(image_id, 0) == removals_before.get(image_id, 0):
                self._present.add(image_id)

    def withdraw_images(self) -> None:
        """Promise no images any more: the test damaged the file that names them."""
        with self._lock:
            self._present.clear()
