"""`guestpulld verify --deep`: compares each image with its id, and each layer with its diff_id in the image.

An image's id is the digest of its config, and the config lists the layers' diff_ids. A layer's tar-split and
directory must produce a tar with that digest (layer/proof.py). The store's own metadata proves nothing. A layer
that we unpacked and can no longer prove is a fault; a layer that another program stored without a tar-split is
reported as unproved. Layers are proved in parallel, with one process per core.
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
_MAX_CHANGES: Final = 20  # reported for one layer; the others are counted


@dataclass(frozen=True, slots=True)
class DeepAudit:
    """The result of `deep_audit`.

    Attributes:
        findings: what was altered or cannot be proved.
        proved: the number of layers that match their images' ids.
        unproved: the number of layers without known damage and without proof.
    """

    findings: tuple[Finding, ...]
    proved: int
    unproved: int


def deep_audit(work_dir: str, guest_work_dir: str | None, limits: Limits) -> DeepAudit:
    """Prove every image and every layer of a store, and report what was altered or cannot be proved.

    Raises:
        InvalidStore: the directory does not exist.
        StorageFailed: the operating system reported an error.
    """
    inputs = gather_proof_inputs(work_dir, guest_work_dir)
    found = [finding for image in inputs.images for finding in _image(inputs, image)]
    proven = {diff_id for image in inputs.images if image.proved for diff_id in image.proved.diff_ids}
    jobs = [(layer, limits) for layer in inputs.layers]
    counts = {True: 0, False: 0}
    # freeze inherited objects: traversing them in each garbage collection takes 3 % of all CPU time
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
                Fault.CORRUPT, path, f"{sentence}, nor is a backup.", _RESTORE, images=(record.image_id,)
            )
        else:
            yield Finding(
                Fault.NOTE, path, f"{sentence}: another program rewrote it.", "Its layers are not proved."
            )
        return
    corrected = proved.corrected(record)
    if corrected.manifest_digests != record.manifest_digests:
        sentence = (
            f"the digest of image {record.image_id} is {' and '.join(record.manifest_digests)}; its backup in "
            f"images/ says {' and '.join(corrected.manifest_digests)}."
        )
        yield Finding(Fault.CORRUPT, path, sentence, _RESTORE, images=(record.image_id,))
    if corrected.layers != record.layers:
        sentence = f"the layers of image {record.image_id} are not those that its config names."
        yield Finding(Fault.CORRUPT, path, sentence, _RESTORE, images=(record.image_id,))
    yield from _entries(path, image)


def _entries(path: str, image: ImageProofInput) -> Iterator[Finding]:
    """Compare the diff_ids of layer_db with those of the image."""
    diff_ids: Mapping[Digest, Digest] = {
        layer.compressed_digest: layer.uncompressed_digest for layer in image.record.layers
    }
    for layer in image.layers:
        digest = layer.compressed_digest
        if layer.uncompressed_digest != diff_ids[digest]:
            sentence = (
                f"layer {digest} has diff_id {diff_ids[digest]} in image {image.record.image_id}, but "
                f"{layer.uncompressed_digest} in layer_db."
            )
            yield Finding(Fault.CORRUPT, path, sentence, _REPAIR, digest, (image.record.image_id,))


# -- layers -----------------------------------------------------------------------------------------------------


def _altered(subject: LayerProofInput, changes: list[str]) -> Iterator[Finding]:
    digest, path = subject.layer.compressed_digest, subject.layer.store_path
    reported = changes[:_MAX_CHANGES]
    if len(changes) > _MAX_CHANGES:
        reported.append(f"{len(changes) - _MAX_CHANGES} more changes")
    for change in reported:
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
        yield Finding(Fault.NOTE, path, sentence, "No image uses it: `guestpulld gc` deletes it.")
    elif subject.tar_split is not None or subject.has_metadata:
        yield Finding(Fault.CORRUPT, path, sentence, _REPAIR, digest, images)
    else:
        yield Finding(Fault.NOTE, path, sentence, "Another program rewrote the config of its image.")


def _changes(job: tuple[LayerProofInput, Limits]) -> list[str]:
    """Return how a layer was altered. Runs in a worker process, and reports errors as changes of this layer."""
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
