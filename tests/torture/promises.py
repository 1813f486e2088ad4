"""What callers were told, and may rely on whatever happens next."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """What is known of a bundle."""

    ABSENT = "absent"
    READY = "ready"
    COMING = "coming"
    """A pull was given up, or its answer never came: the bundle is there, whole, or it is not."""
    LEAVING = "leaving"
    """A release was begun, and its answer never came."""
    TAKEN = "taken"
    """It was unmounted and its directory removed, without a call: the daemon releases it soon."""


@dataclass
class BundlePromise:
    """One bundle's place.

    Attributes:
        state: what is known of it.
        image_id: what was pulled into it, where it is READY.
        written: what its caller wrote in its top since, by name.
    """

    state: State = State.ABSENT
    image_id: str = ""
    written: dict[str, bytes] = field(default_factory=dict)


class Promises:
    """What is known of all bundles and images. A bundle's place belongs to one caller; images are everybody's."""

    def __init__(self) -> None:
        self.bundles: dict[str, BundlePromise] = {}
        self.contested: set[str] = set()
        """Places that several callers pull into: of these only the outcome can be looked at."""
        self._lock = threading.Lock()
        self._present: set[str] = set()
        self._removals: dict[str, int] = {}
        self._removals_under_way: dict[str, int] = {}

    def bundle(self, path: str) -> BundlePromise:
        """What is known of a place."""
        with self._lock:
            return self.bundles.setdefault(path, BundlePromise())

    def present_images(self) -> frozenset[str]:
        """The images that must be in the store: pulled, and nobody asked for their removal since."""
        with self._lock:
            return frozenset(self._present)

    @contextmanager
    def removing(self, image_id: str) -> Iterator[None]:
        """While inside, and if it does not come to an end, nothing is promised of the image."""
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
        """How often the removal of each image was asked for, by now; for `pulled`."""
        with self._lock:
            return self._removals | {
                image_id: -1 for image_id, number in self._removals_under_way.items() if number
            }

    def pulled(self, image_id: str, removals_before: Mapping[str, int]) -> None:
        """A pull has ended well, which began when so many removals had been asked for."""
        with self._lock:
            if self._removals.get(image_id, 0) == removals_before.get(image_id, 0):
                self._present.add(image_id)

    def withdraw_images(self) -> None:
        """Promise no image any more: the file that names them was damaged on purpose."""
        with self._lock:
            self._present.clear()
