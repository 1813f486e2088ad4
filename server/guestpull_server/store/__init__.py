"""What is on disk: meta_store.json, layers, bundles; their one owner, and what is true after a crash.

In: layers that were unpacked into a staging directory, images that were resolved, bundles that are ready. Out:
what of these is there, and may be believed.

  store.py         the state of a work directory, and all that changes it
  layers.py        how layers come and go
  images.py        how images are recorded and named
  ledger.py        what is written down of all this, read and kept true
  durability.py    what is made durable when, and in which order: read this before you change any order
  workdir.py       the directories, the lock, staging
  access.py        who may reach what is in a work directory
  catalog.py       meta_store.json: image-rs's file
  entries.py       what one entry of it means
  names.py         how images are found
  copies.py        images/: what is left of images when meta_store.json is damaged
  facts.py         layer_facts.jsonl: what meta_store.json has no place for
  paths.py         where layers are, for the guest and here
  guest_view.py    where its guest sees a store that nobody was told of
  trees.py         whole directories, deleted and measured
  files.py         files, read whatever has their names
  filesystems.py   what kind of file system a path lies on
  overlays.py      what an overlay between us and the disk spoils
  deletion.py      how layers go
  reserve.py       room that a removal needs on a full disk
  bundles.py       bundles: reserved, ready, released
  bundle_making.py how a bundle is made on disk, and taken away
  bundle_files.py  what is written down of a bundle
  bundle_paths.py  where bundles may be, and what of their directories is ours
  readonly.py      stores that are only read
  inventory.py     what lies in a work directory, read without changing anything
  unreferenced.py  what nothing in it refers to
  evidence.py      what there is to prove images and layers by
  audit.py         what is wrong there: `guestpulld verify`
  garbage.py       what nothing refers to: `guestpulld gc`
  outcomes.py      what the store answers with

Nothing here knows registries, tars or system calls of mounting. Start with `store.Store`.
"""

from guestpull_server.store.audit import (
    Fault,
    Finding,
    audit,
)
from guestpull_server.store.bundle_making import Mounts
from guestpull_server.store.bundles import BundleReservation, StoredBundle
from guestpull_server.store.evidence import Evidence, ImageEvidence, LayerEvidence, gather_evidence
from guestpull_server.store.garbage import collect_garbage
from guestpull_server.store.guest_view import guest_work_dirs, likely_guest_work_dir
from guestpull_server.store.outcomes import Deleted, Garbage, Removal, StoreUsage
from guestpull_server.store.store import Store
from guestpull_server.store.workdir import LOCK, StagedLayer

__all__ = [
    "LOCK",
    "BundleReservation",
    "Deleted",
    "Evidence",
    "Fault",
    "Finding",
    "Garbage",
    "ImageEvidence",
    "LayerEvidence",
    "Mounts",
    "Removal",
    "StagedLayer",
    "Store",
    "StoreUsage",
    "StoredBundle",
    "audit",
    "collect_garbage",
    "gather_evidence",
    "guest_work_dirs",
    "likely_guest_work_dir",
]
