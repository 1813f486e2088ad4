"""What is on disk: meta_store.json, layers, images, bundles; who owns them, and what is true after a crash.

In: layers that were unpacked into a staging directory, images that were resolved, bundles that are ready.
Out: images, layers and bundles that exist and may be trusted.

  store.py           the front: the state of a work directory, and all operations on it
  layers.py          add, keep and delete layers
  images.py          find, record, name and repair images
  image_names.py     find images by id, digest, reference and platform
  bundles.py         which bundles exist, and who may create or release one
  bundle_making.py   create and undo bundles on disk
  bundle_paths.py    which paths bundles may have
  access.py          directories that no other user may enter or replace
  durability.py      what is made durable when, and in which order: read this before you change any order
  workdir.py         the directories of a work directory, its lock, staging
  filesystem.py      files, trees and file systems whose content is not trusted
  metadata_db.py     the state on disk: read it, repair it, change it
  meta_store.py      meta_store.json, image-rs's file
  entries.py         the entries of meta_store.json
  image_backups.py   images/: backups of image entries
  layer_metadata.py  records/<name>.json: what meta_store.json has no fields for
  layer_paths.py     where layers are, in the guest and on this machine
  survey.py          the one reading of a work directory
  read_only.py       stores that are only read
  inventory.py       everything in a work directory, and what it belongs to
  audit.py           find what is wrong: `guestpulld verify`
  garbage.py         delete what nothing refers to: `guestpulld gc`
  proof_inputs.py    what proves images and layers: `guestpulld verify --deep`

Nothing here knows of registries, tars or mount system calls. Start with `store.Store`.
"""

from guestpull_server.store.audit import (
    Fault,
    Finding,
    audit,
)
from guestpull_server.store.bundle_making import Mounts
from guestpull_server.store.bundles import BundleReservation, StoredBundle
from guestpull_server.store.garbage import Garbage, collect_garbage
from guestpull_server.store.inventory import guest_work_dirs, likely_guest_work_dir
from guestpull_server.store.layers import Deleted
from guestpull_server.store.proof_inputs import (
    ImageProofInput,
    LayerProofInput,
    ProofInputs,
    gather_proof_inputs,
)
from guestpull_server.store.store import Removal, Store, StoreUsage
from guestpull_server.store.workdir import LOCK, StagedLayer

__all__ = [
    "LOCK",
    "BundleReservation",
    "Deleted",
    "Fault",
    "Finding",
    "Garbage",
    "ImageProofInput",
    "LayerProofInput",
    "Mounts",
    "ProofInputs",
    "Removal",
    "StagedLayer",
    "Store",
    "StoreUsage",
    "StoredBundle",
    "audit",
    "collect_garbage",
    "gather_proof_inputs",
    "guest_work_dirs",
    "likely_guest_work_dir",
]
