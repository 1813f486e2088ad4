"""Find what is wrong with a work directory: `guestpulld verify`, without proving layers (layer/proof.py).

    for finding in audit("/run/kata-containers/image"):
        print(finding.sentence, finding.remedy)

Only reads, and may run beside a daemon: operations that the daemon has not finished are not reported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from guestpull_server.errors import storage_errors
from guestpull_server.models import Digest, ImageConfig, StoredLayer
from guestpull_server.store.entries import ImageRecord, Unreadable, metas_problem
from guestpull_server.store.filesystem import (
    OVERLAY_BELOW_WORK_DIR,
    WORK_DIR_REMEDY,
    is_directory,
    overlay_below,
    tree_bytes,
)
from guestpull_server.store.image_backups import image_id_of, read_backup
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.layer_metadata import OLD_FILE_NAME, contradiction
from guestpull_server.store.meta_store import FILE_NAME
from guestpull_server.store.workdir import directories_of

_START: Final = "Start guestpulld on this work directory, or run `guestpulld verify --repair`."
_REPAIR: Final = "Pull the image again, or run `guestpulld verify --repair`."
_RESTORE: Final = "Run `guestpulld verify --repair`, or pull or bake the image again."
_COLLECT: Final = "Nothing needs it: run `guestpulld gc` to delete it."
_LOOK: Final = "Delete it if you do not need it."


class Fault(Enum):
    """The kind of a finding."""

    MISSING = "missing"
    INCOMPLETE = "incomplete"
    FOREIGN = "foreign"
    CORRUPT = "corrupt"
    NOTE = "note"
    """Nothing is wrong, but somebody may want to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found, and what to do about it.

    Attributes:
        fault: the kind of the finding.
        path: the path that it is about.
        sentence: what was found.
        remedy: what to do.
        layer: the layer to download again, if that repairs it.
        images: the images that need the layer; if there are none, gc deletes it.
    """

    fault: Fault
    path: str
    sentence: str
    remedy: str
    layer: Digest | None = None
    images: tuple[Digest, ...] = ()


def audit(work_dir: str, guest_work_dir: str | None = None) -> tuple[Finding, ...]:
    """Find what is missing, incomplete, foreign or corrupt.

    Args:
        work_dir: the work directory.
        guest_work_dir: the same directory in the guest; None if the path is the same.

    Raises:
        InvalidStore: the directory does not exist.
        StorageFailed: the operating system refuses.
    """
    inventory = take_inventory(work_dir, guest_work_dir)
    return (
        *_meta_store(inventory),
        *_layers(inventory),
        *_images(inventory),
        *_bundles(inventory),
        *_overlays(inventory),
        *_leftovers(inventory),
        *_foreign(inventory),
    )


def _meta_store(inventory: Inventory) -> Iterator[Finding]:
    path = inventory.path(FILE_NAME)
    if inventory.damage:
        sentence = f"{path} is damaged: {inventory.damage}."
        yield Finding(Fault.CORRUPT, path, sentence, f"{_START} What is certain is restored.")
    files = inventory.survey.files
    if files.old_file_damage:
        old_file = inventory.path(OLD_FILE_NAME)
        sentence = f"{old_file} is damaged: {files.old_file_damage}."
        yield Finding(Fault.CORRUPT, old_file, sentence, f"{_START} It is set aside.")
    for name, problem in files.damaged:
        damaged = inventory.path("records", name)
        sentence = f"{damaged}, the metadata of a layer, is damaged: {problem}."
        yield Finding(Fault.CORRUPT, damaged, sentence, f"{_START} It is deleted.")
    for entry in inventory.meta_store.unusable:
        remedy = _START if entry.key in inventory.metadata else "Fix the entry, or delete it."
        yield Finding(Fault.CORRUPT, path, f"{path}: {entry}.", remedy)
    for name in inventory.set_aside:
        aside = inventory.path(name)
        was = name.partition(".corrupt-")[0]
        yield Finding(Fault.NOTE, aside, f"{aside} is a {was} that was damaged.", _LOOK)


def _layers(inventory: Inventory) -> Iterator[Finding]:
    users = inventory.users_of_layers()
    for digest, layer in sorted(inventory.meta_store.layers.items()):
        yield from _layer(inventory, layer, tuple(users.get(digest, ())))
    yield from _shared_directories(inventory, users)
    if inventory.damage or inventory.owner is not None:
        return
    reported = {entry.key for entry in inventory.meta_store.unusable}
    for metadata in inventory.layers_without_entry():
        if metadata.compressed_digest in reported:
            continue
        path = inventory.path("layers", metadata.directory)
        sentence = f"{path} is layer {metadata.compressed_digest}, which was committed but has no entry."
        yield Finding(Fault.INCOMPLETE, path, sentence, _START)


def _layer(inventory: Inventory, layer: StoredLayer, images: tuple[Digest, ...]) -> Iterator[Finding]:
    digest = layer.compressed_digest
    metadata = inventory.metadata.get(digest)
    altered = contradiction(layer, metadata) if metadata is not None else ""
    if metadata is not None and altered:
        path = inventory.path("layers", metadata.directory)
        yield Finding(Fault.CORRUPT, path, f"layer {digest} was altered in {FILE_NAME}: {altered}.", _START)
        return
    path = inventory.paths.local(layer)
    if not is_directory(path):
        sentence = f"layer {digest} is missing: {path} is not a directory."
        yield Finding(Fault.MISSING, path, sentence, _REPAIR if images else _COLLECT, digest, images)
        return
    if metadata is None or metadata.directory != inventory.directory_of(layer):
        return
    with storage_errors("measuring a layer", path):
        size = tree_bytes(path)
    if size != metadata.size_bytes:
        sentence = f"layer {digest}: the files in {path} have {size} bytes instead of {metadata.size_bytes}."
        yield Finding(Fault.INCOMPLETE, path, sentence, _REPAIR if images else _COLLECT, digest, images)


def _shared_directories(inventory: Inventory, users: Mapping[Digest, Sequence[Digest]]) -> Iterator[Finding]:
    """Yield entries that point to the directory of another layer: at most one of them is right."""
    owners = {metadata.directory: digest for digest, metadata in inventory.metadata.items()}
    for name, digests in sorted(inventory.paths.claims(inventory.meta_store.layers.values()).items()):
        path = inventory.path("layers", name)
        for text in sorted(digests) if len(digests) > 1 else ():
            digest = Digest(text)
            if owners.get(name) == digest:
                continue
            others = ", ".join(sorted(digests - {digest}))
            sentence = (
                f"{path} is layer {digest} according to its entry, and layer {others} according to others."
            )
            images = tuple(users.get(digest, ()))
            yield Finding(Fault.CORRUPT, path, sentence, _REPAIR if images else _COLLECT, digest, images)


def _images(inventory: Inventory) -> Iterator[Finding]:
    path = inventory.path(FILE_NAME)
    known = frozenset(inventory.meta_store.layers.keys() | inventory.metadata.keys())
    certain = {
        digest: layer
        for digest, layer in inventory.meta_store.layers.items()
        if digest not in inventory.metadata or not contradiction(layer, inventory.metadata[digest])
    }
    for image_id, record in sorted(inventory.meta_store.images.items()):
        for layer in dict.fromkeys(record.layers):
            if layer.compressed_digest not in known:
                sentence = f"layer {layer.compressed_digest} of image {image_id} has no entry in layer_db."
                yield Finding(Fault.MISSING, path, sentence, _REPAIR, layer.compressed_digest, (image_id,))
        yield from _image(inventory, record, certain)


def _image(
    inventory: Inventory, record: ImageRecord, certain: Mapping[Digest, StoredLayer]
) -> Iterator[Finding]:
    """Yield differences between an image, layer_db, and the image's backup."""
    ours = any(image_id_of(name) == record.image_id for name in inventory.survey.images)
    problem = metas_problem(record, certain, of_another_program=not ours)
    if problem:
        path = inventory.path(FILE_NAME)
        yield Finding(Fault.CORRUPT, path, f"image {record.image_id} was altered: {problem}.", _START)
    for name in inventory.survey.images:
        if image_id_of(name) == record.image_id:
            path = inventory.path("images", name)
            try:
                backup, _ = read_backup(path, record.image_id)
            except (Unreadable, OSError) as error:
                sentence = f"{path}, the backup of image {record.image_id}, cannot be used: {error}."
                yield Finding(Fault.CORRUPT, path, sentence, _RESTORE)
                continue
            if _meaning(backup.config) != _meaning(record.config):
                path = inventory.path(FILE_NAME)
                sentence = f"the image_config of image {record.image_id} does not match the image id."
                yield Finding(Fault.CORRUPT, path, sentence, _RESTORE)


def _meaning(config: bytes) -> tuple[object, ...]:
    """Return the parts of an image config that we use, independent of its format: other programs reformat it."""
    read = msgspec.json.decode(config, type=ImageConfig)
    process = read.process
    return (
        read.platform,
        read.rootfs.diff_ids if read.rootfs else None,
        process.user,
        process.env,
        process.entrypoint,
        process.cmd,
        process.working_dir,
        frozenset(process.volumes or ()),
        frozenset(process.exposed_ports or ()),
        process.labels,
        process.stop_signal,
    )


def _bundles(inventory: Inventory) -> Iterator[Finding]:
    for name, bundle in inventory.bundles.items():
        for text in bundle.layers:
            layer = inventory.meta_store.layers.get(Digest(text))
            if layer is None or not is_directory(inventory.paths.local(layer)):
                sentence = f"layer {text} of bundle {bundle.bundle_path} is missing."
                yield Finding(Fault.MISSING, inventory.path("overlay", name), sentence, "Release the bundle.")
    for name in inventory.unreadable:
        path = inventory.path("overlay", name)
        sentence = f"{path} belongs to a bundle, but its bundle.json cannot be read."
        yield Finding(
            Fault.CORRUPT, path, sentence, "Unmount the bundle that it is mounted at, and delete it."
        )


def _overlays(inventory: Inventory) -> Iterator[Finding]:
    layers = inventory.meta_store.layers.values()
    overlay = overlay_below(
        (
            *directories_of(inventory.work_dir),
            *(os.path.dirname(inventory.paths.local(layer)) for layer in layers),
        )
    )
    if overlay is not None:
        yield Finding(Fault.NOTE, overlay, f"{overlay} {OVERLAY_BELOW_WORK_DIR}.", f"{WORK_DIR_REMEDY}.")


def _leftovers(inventory: Inventory) -> Iterator[Finding]:
    if inventory.owner is not None:
        return
    for name in inventory.staging:
        path = inventory.path("staging", name)
        yield Finding(Fault.INCOMPLETE, path, f"{path} was left by a crash.", _COLLECT)
    for name in inventory.half_written:
        path = inventory.path(name)
        yield Finding(Fault.INCOMPLETE, path, f"{path} is half written.", _COLLECT)
    for name in inventory.unfinished:
        path = inventory.path("overlay", name)
        yield Finding(Fault.INCOMPLETE, path, f"{path} belongs to a bundle that was not finished.", _COLLECT)


def _foreign(inventory: Inventory) -> Iterator[Finding]:
    if inventory.owner is None:
        for path in inventory.strays():
            yield Finding(Fault.FOREIGN, path, f"{path} belongs to no layer.", _COLLECT)
        # what belongs to a layer whose directory is missing is reported with the layer
        claims = inventory.paths.claims(inventory.meta_store.layers.values())
        for path in inventory.orphans():
            if os.path.splitext(os.path.basename(path))[0] in claims:
                continue
            yield Finding(Fault.FOREIGN, path, f"{path} describes something that no longer exists.", _COLLECT)
        for path in inventory.foreign():
            yield Finding(Fault.FOREIGN, path, f"{path} is not a file of this service.", _COLLECT)
    for name in inventory.strange:
        path = inventory.path("overlay", name)
        yield Finding(Fault.FOREIGN, path, f"{path} is not a file of this service.", _LOOK)
    for name in inventory.unknown:
        path = inventory.path(name)
        yield Finding(Fault.NOTE, path, f"{path} is not a file of this service.", _LOOK)
