"""`guestpulld verify --deep`: each layer against the image's own digest, and not against any list beside it.

An image's id is the digest of its config, and the config has the layers' diff_ids. A layer's record and directory
must make a tar of that digest (layer/proof.py). Layers are proved side by side, a process a core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer import verify_layer, verify_unrecorded
from guestpull_server.models import Digest
from guestpull_server.store import Fault, Finding, RecordedLayer, proven_diff_ids, recorded_layers

_REPAIR: Final = "Run `guestpulld verify --deep --repair`, which downloads it again."
_TOLD: Final = 20  # changes of one layer; what is beyond says no more than that it was altered


def deep_audit(work_dir: str, guest_work_dir: str | None, limits: Limits) -> tuple[Finding, ...]:
    """Prove every layer that is there, and say what of it was altered or cannot be proved.

    Raises:
        InvalidStore: there is no such directory.
        StorageFailed: the operating system refuses.
    """
    layers = recorded_layers(work_dir, guest_work_dir)
    proven = proven_diff_ids(work_dir, guest_work_dir)
    jobs = [(recorded, limits) for recorded in layers]
    found: list[Finding] = []
    with ProcessPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        for recorded, changes in zip(layers, pool.map(_changes, jobs), strict=True):
            found += _altered(recorded, changes)
            found += _unprovable(recorded, proven)
    return tuple(found)


def _altered(recorded: RecordedLayer, changes: list[str]) -> Iterator[Finding]:
    digest, path = recorded.layer.compressed_digest, recorded.layer.store_path
    told = changes[:_TOLD]
    if len(changes) > _TOLD:
        told.append(f"{len(changes) - _TOLD} more changes")
    for change in told:
        yield Finding(Fault.CORRUPT, path, f"layer {digest}: {change}.", _REPAIR, digest, recorded.images)


def _unprovable(recorded: RecordedLayer, proven: frozenset[Digest]) -> Iterator[Finding]:
    layer = recorded.layer
    digest, path = layer.compressed_digest, layer.store_path
    if recorded.record is None:
        sentence = f"layer {digest} has no record: it was checked as far as it can be, and is not proved."
        yield Finding(Fault.NOTE, path, sentence, "Remove and pull it again to have it proved.")
    if layer.uncompressed_digest not in proven:
        sentence = f"no image's id proves diff_id {layer.uncompressed_digest} of layer {digest}."
        yield Finding(Fault.NOTE, path, sentence, "Its image was removed, or its config was written anew.")


def _changes(job: tuple[RecordedLayer, Limits]) -> list[str]:
    """What of a layer was altered; run in a process of its own."""
    recorded, limits = job
    layer = recorded.layer
    if recorded.record is None:
        return [str(change) for change in verify_unrecorded(layer.store_path)]
    found = verify_layer(layer.store_path, recorded.record, layer.uncompressed_digest, limits=limits)
    return [str(change) for change in found]
