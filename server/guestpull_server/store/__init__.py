"""What is on disk: meta_store.json, layers, bundles; their one owner, and what is true after a crash.

In: layers that were unpacked into a staging directory, images that were resolved, bundles that are ready. Out:
what of these is there, and may be believed.

  store.py       the state of a work directory, and all that changes it
  durability.py  what is made durable when, and in which order: read this before you change any order
  workdir.py     the directories, the lock, staging
  catalog.py     meta_store.json: image-rs's file
  facts.py       layer_facts.jsonl: what meta_store.json has no place for
  bundles.py     bundles: reserved, ready, released
  deletion.py    how layers go
  readonly.py    stores that are only read

Nothing here knows registries, tars or system calls of mounting. Start with `store.Store`.
"""

from guestpull_server.store.bundles import BundleReservation, Mounts, StoredBundle
from guestpull_server.store.store import Deleted, LayerNames, Removal, Store, StoreUsage
from guestpull_server.store.workdir import StagedLayer

__all__ = [
    "BundleReservation",
    "Deleted",
    "LayerNames",
    "Mounts",
    "Removal",
    "StagedLayer",
    "Store",
    "StoreUsage",
    "StoredBundle",
]
