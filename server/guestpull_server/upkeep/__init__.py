"""Upkeep of work directories: commands, and background work of a daemon.

  baking.py        `guestpulld bake`: brings images into a work directory without a daemon
  verification.py  `guestpulld verify`: finds and repairs damage; deep_audit.py proves images and layers
  repair.py        downloads the damaged layers of an image again
  collection.py    `guestpulld gc`: deletes what nothing refers to
  expiry.py        background: deletes layers that have been unused for a while
  bundle_watch.py  background: releases bundles that others removed without a call
  work_dirs.py     shared by the commands

The modules use the store, and the pipeline through `Puller`. None imports gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from guestpull_server.config import Configuration
from guestpull_server.pull import Background
from guestpull_server.store import Store
from guestpull_server.upkeep.bundle_watch import BundleWatch
from guestpull_server.upkeep.expiry import Expiry


def in_background(configuration: Configuration) -> Sequence[Callable[[Store], Background]]:
    """Return the background work of a daemon, for `Puller.open`."""
    return BundleWatch, lambda store: Expiry(store, configuration.limits.unused_layer_seconds)
