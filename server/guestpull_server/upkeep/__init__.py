"""Upkeep of work directories: what is done ahead of time, afterwards, and in the background.

  baking.py        `guestpulld bake`: brings images into a work directory without a daemon
  verification.py  `guestpulld verify`: finds what is wrong; deep_audit.py proves layers and images
  repair.py        downloads the damaged layers of an image again
  collection.py    `guestpulld gc`: deletes what nothing refers to
  expiry.py        deletes layers that nobody has used for a while, while a daemon serves
  bundle_watch.py  releases bundles that others took away without a call, likewise
  work_dirs.py     what the commands share

Everything here uses the pipeline through `Puller`, and the store. Nothing here knows gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guestpull_server.config import Configuration
from guestpull_server.pull import Background
from guestpull_server.store import Store
from guestpull_server.upkeep.bundle_watch import BundleWatch
from guestpull_server.upkeep.expiry import Expiry


def in_background(configuration: Configuration) -> Sequence[Callable[[Store], Background]]:
    """What works on the store of a daemon in the background; for `Puller.open`."""
    return BundleWatch, lambda store: Expiry(store, configuration.limits.unused_layer_seconds)
