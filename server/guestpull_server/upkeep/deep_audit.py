"""`guestpulld verify --deep`: each image against its id, each layer against the image's own digest.

An image's id is the digest of its config, and the config has the layers' diff_ids. A layer's tar-split and
directory must make a tar of that digest (layer/proof.py). Nothing is believed for being listed beside them: what
we unpacked and cannot prove any more is a fault; what another program made without any proof is said to be
unproved. Layers are proved side by side, a process a core.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.errors import GuestpullError
from guestpull_server.layer import implied_fingerprint, inspect_layer, verify_layer
from guestpull_server.models import Digest
from guestpull_server.store import (
    Fault,
    Finding,
    ImageProofInput,
    LayerProofInput,
    ProofInputs,
    gather_proof_inputs,
)

_REPAIR: Final = "Run `guestpulld verify --deep --repair`, which downloads it again, or bake its image again."
_RESTORE: Final = "Run `guestpulld verify --deep --repair`, which restores it, or bake the image again."
_TOLD: Final = 20  # changes of one layer; what is beyond says no more than that it was altered


@dataclass(frozen=True, slots=True)
class DeepAudit:
    """What came of it.

    Attributes:
        findings: what was altered, or lacks its proof.
        proved: how many layers are what the ids of their images say.
        unproved: how many layers nothing is known to be wrong with, and nothing proves.
    """

    findings: tuple[Finding, ...]
    proved: int
    unproved: int


def deep_audit(work_dir: str, guest_work_dir: str | None, limits: Limits) -> DeepAudit:
    """Prove every image and every layer that is there, and say what was altered or cannot be proved.

    Raises:
        InvalidStore: there is no such directory.
        StorageFailed: the operating system refuses.
    """
    inputs = gather_proof_inputs(work_dir, guest_work_dir)
    found = [finding for image in inputs.images for finding in _image(inputs, image)]
    proven = {diff_id for image in inputs.images if image.proved for diff_id in image.proved.diff_ids}
    jobs = [(layer, limits) for layer in inputs.layers]
    counts = {True: 0, False: 0}
    # frozen, what they inherit is not gone through by their garbage collection: a thirtieth of all CPU time
    processes = max(1, min(len(jobs), os.cpu_count() or 1))
    with ProcessPoolExecutor(processes, initializer=gc.freeze) as pool:
        for layer, changes in zip(inputs.layers, pool.map(_changes, jobs), strict=True):
            if not os.path.lexists(layer.layer.store_path):
                continue  # a daemon has deleted it meanwhile
            of_layer = [*_altered(layer, changes), *_unprovable(layer, proven)]
            found += of_layer
            if all(finding.fault is Fault.NOTE for finding in of_layer):
                counts[not of_layer] += 1
    return DeepAudit(tuple(found), counts[True], counts[False])


# -- images -----------------------------------------------------------------------------------------------------


def _image(inputs: ProofInputs, image: ImageProofInput) -> Iterator[Finding]:
    record, proved = image.record, image.proved
    path = os.path.join(inputs.work_dir, "meta_store.json")
    if proved is None:
        ours = {
            layer.layer.compressed_digest for layer in inputs.layers if layer.has_metadata or layer.tar_split
        }
        sentence = f"the image_config of image {record.image_id} is not the one that its id names"
        if any(layer.compressed_digest in ours for layer in record.layers):
            yield Finding(
                Fault.CORRUPT, path, f"{sentence}, nor is a copy.", _RESTORE, images=(record.image_id,)
            )
        else:
            yield Finding(
                Fault.NOTE, path, f"{sentence}: another program wrote it anew.", "Its layers are not proved."
            )
        return
    right = proved.corrected(record)
    if right.manifest_digests != record.manifest_digests:
        sentence = (
            f"the digest of image {record.image_id} is {' and '.join(record.manifest_digests)}; its backup in "
            f"images/ says {' and '.join(right.manifest_digests)}."
        )
        yield Finding(Fault.CORRUPT, path, sentence, _RESTORE, images=(record.image_id,))
    if right.layers != record.layers:
        sentence = f"the layers of image {record.image_id} are not those that its config names."
        yield Finding(Fault.CORRUPT, path, sentence, _RESTORE, images=(record.image_id,))
    yield from _entries(path, image)


def _entries(path: str, image: ImageProofInput) -> Iterator[Finding]:
    """layer_db must say the same of a layer as the image that has it."""
    said: Mapping[Digest, Digest] = {
        layer.compressed_digest: layer.uncompressed_digest for layer in image.record.layers
    }
    for layer in image.layers:
        digest = layer.compressed_digest
        if layer.uncompressed_digest != said[digest]:
            sentence = (
                f"layer {digest} has diff_id {said[digest]} in image {image.record.image_id}, but "
                f"{layer.uncompressed_digest} in layer_db."
            )
            yield Finding(Fault.CORRUPT, path, sentence, _REPAIR, digest, (image.record.image_id,))


# -- layers -----------------------------------------------------------------------------------------------------


def _altered(subject: LayerProofInput, changes: list[str]) -> Iterator[Finding]:
    digest, path = subject.layer.compressed_digest, subject.layer.store_path
    told = changes[:_TOLD]
    if len(changes) > _TOLD:
        told.append(f"{len(changes) - _TOLD} more changes")
    for change in told:
        yield Finding(Fault.CORRUPT, path, f"layer {digest}: {change}.", _REPAIR, digest, subject.images)


def _unprovable(subject: LayerProofInput, proven: set[str]) -> Iterator[Finding]:
    layer, images = subject.layer, subject.images
    digest, path = layer.compressed_digest, layer.store_path
    if subject.tar_split is None and subject.has_metadata:
        sentence = f"layer {digest} has no tar-split any more, and cannot be proved."
        yield Finding(Fault.INCOMPLETE, path, sentence, _REPAIR, digest, images)
    elif subject.tar_split is None:
        sentence = f"layer {digest} has no tar-split: it was checked as far as it can be, and is not proved."
        yield Finding(Fault.NOTE, path, sentence, "Remove and pull it again to have it proved.")
    elif not subject.has_metadata:
        sentence = f"layer {digest} has a tar-split, but no metadata."
        yield Finding(Fault.INCOMPLETE, path, sentence, _REPAIR, digest, images)
    if layer.uncompressed_digest in proven:
        return
    sentence = f"no image's id proves diff_id {layer.uncompressed_digest} of layer {digest}."
    if not images:
        yield Finding(Fault.NOTE, path, sentence, "No image has it: `guestpulld gc` deletes it.")
    elif subject.tar_split is not None or subject.has_metadata:
        yield Finding(Fault.CORRUPT, path, sentence, _REPAIR, digest, images)
    else:
        yield Finding(Fault.NOTE, path, sentence, "Another program wrote its image's config anew.")


def _changes(job: tuple[LayerProofInput, Limits]) -> list[str]:
    """What of a layer was altered; run in a process of its own. One that cannot be read keeps no other from it."""
    subject, limits = job
    layer = subject.layer
    try:
        if subject.tar_split is None:
            found = inspect_layer(layer.store_path)
        else:
            implied = implied_fingerprint(layer.implied_directories) if subject.has_metadata else ""
            found = verify_layer(
                layer.store_path, subject.tar_split, layer.uncompressed_digest, implied=implied, limits=limits
            )
    except GuestpullError as error:
        return [f"it cannot be verified: {error}"]
    return [str(change) for change in found]
