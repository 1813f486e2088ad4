"""What is wrong with a work directory: `guestpulld verify`, short of reassembling layers (layer/proof.py).

    for finding in audit("/run/kata-containers/image"):
        print(finding.sentence, finding.remedy)

It only reads, and may run beside a daemon; what that one is in the middle of is not found fault with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from guestpull_server.errors import storage_errors
from guestpull_server.models import Digest, ImageConfig, StoredLayer
from guestpull_server.store.catalog import FILE_NAME
from guestpull_server.store.copies import image_id_of, read_copy
from guestpull_server.store.entries import ImageRecord, Unreadable, metas_problem
from guestpull_server.store.facts import FILE_NAME as FACTS_FILE_NAME
from guestpull_server.store.facts import contradiction
from guestpull_server.store.inventory import Inventory, take_inventory
from guestpull_server.store.overlays import WORK_DIR_REMEDY, WORK_DIR_SPOILED, overlay_in
from guestpull_server.store.paths import is_directory
from guestpull_server.store.trees import tree_bytes

_START: Final = "Start guestpulld on this work directory, or run `guestpulld verify --repair`."
_REPAIR: Final = "Pull the image again, or run `guestpulld verify --repair`."
_RESTORE: Final = "Run `guestpulld verify --repair`, or pull or bake the image again."
_COLLECT: Final = "Nothing needs it: run `guestpulld gc`, which deletes it."
_LOOK: Final = "Delete it if it is of no use to you."


class Fault(Enum):
    """What kind of thing is wrong."""

    MISSING = "missing"
    INCOMPLETE = "incomplete"
    FOREIGN = "foreign"
    CORRUPT = "corrupt"
    NOTE = "note"
    """Nothing is wrong; somebody may want to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        fault: what kind of thing it is.
        path: what it is about.
        sentence: what was found.
        remedy: what to do about it.
        layer: the layer that must be downloaded again, if that would put it right.
        images: the images that need that layer; where none does, gc deletes it.
    """

    fault: Fault
    path: str
    sentence: str
    remedy: str
    layer: Digest | None = None
    images: tuple[Digest, ...] = ()


def audit(work_dir: str, guest_work_dir: str | None = None) -> tuple[Finding, ...]:
    """Look for what is missing, incomplete, foreign or corrupt.

    Args:
        work_dir: the work directory.
        guest_work_dir: the same, as its guest sees it; None: as here.

    Raises:
        InvalidStore: there is no such directory.
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
        yield Finding(Fault.CORRUPT, path, sentence, f"{_START} What is certain of it is kept.")
    if inventory.facts_damage:
        facts = inventory.path(FACTS_FILE_NAME)
        sentence = f"{facts} is damaged: {inventory.facts_damage}."
        yield Finding(Fault.CORRUPT, facts, sentence, f"{_START} It is set aside.")
    for entry in inventory.catalog.unusable:
        remedy = _START if entry.key in inventory.facts else "Mend the entry, or take it out."
        yield Finding(Fault.CORRUPT, path, f"{path}: {entry}.", remedy)
    for name in inventory.set_aside:
        aside = inventory.path(name)
        was = name.partition(".corrupt-")[0]
        yield Finding(Fault.NOTE, aside, f"{aside} was {was}, and was damaged.", _LOOK)


def _layers(inventory: Inventory) -> Iterator[Finding]:
    users = inventory.users_of_layers()
    for digest, layer in sorted(inventory.catalog.layers.items()):
        yield from _layer(inventory, layer, tuple(users.get(digest, ())))
    yield from _shared_directories(inventory, users)
    if inventory.damage or inventory.owner is not None:
        return
    told = {entry.key for entry in inventory.catalog.unusable}
    for facts in inventory.unwritten_layers():
        if facts.compressed_digest in told:
            continue
        path = inventory.path("layers", facts.directory)
        sentence = f"{path} is layer {facts.compressed_digest}, which was committed but not written down."
        yield Finding(Fault.INCOMPLETE, path, sentence, _START)


def _layer(inventory: Inventory, layer: StoredLayer, images: tuple[Digest, ...]) -> Iterator[Finding]:
    digest = layer.compressed_digest
    facts = inventory.facts.get(digest)
    altered = contradiction(layer, facts) if facts is not None else ""
    if facts is not None and altered:
        path = inventory.path("layers", facts.directory)
        yield Finding(Fault.CORRUPT, path, f"layer {digest} was altered in {FILE_NAME}: {altered}.", _START)
        return
    path = inventory.paths.local(layer)
    if not is_directory(path):
        sentence = f"layer {digest} is not there: {path} is no directory."
        yield Finding(Fault.MISSING, path, sentence, _REPAIR if images else _COLLECT, digest, images)
        return
    if facts is None or facts.directory != inventory.directory_of(layer):
        return
    with storage_errors("measuring a layer", path):
        size = tree_bytes(path)
    if size != facts.size_bytes:
        sentence = f"layer {digest}: {path} has {size} bytes in its files, of {facts.size_bytes}."
        yield Finding(Fault.INCOMPLETE, path, sentence, _REPAIR if images else _COLLECT, digest, images)


def _shared_directories(inventory: Inventory, users: Mapping[Digest, Sequence[Digest]]) -> Iterator[Finding]:
    """Two layers cannot be in one directory: at most one of their entries is true."""
    owners = {facts.directory: digest for digest, facts in inventory.facts.items()}
    for name, digests in sorted(inventory.paths.claims(inventory.catalog.layers.values()).items()):
        path = inventory.path("layers", name)
        for text in sorted(digests) if len(digests) > 1 else ():
            digest = Digest(text)
            if owners.get(name) == digest:
                continue
            others = ", ".join(sorted(digests - {digest}))
            sentence = f"{path} is layer {digest} by its entry, and layer {others} by another."
            images = tuple(users.get(digest, ()))
            yield Finding(Fault.CORRUPT, path, sentence, _REPAIR if images else _COLLECT, digest, images)


def _images(inventory: Inventory) -> Iterator[Finding]:
    path = inventory.path(FILE_NAME)
    known = frozenset(inventory.catalog.layers.keys() | inventory.facts.keys())
    certain = {
        digest: layer
        for digest, layer in inventory.catalog.layers.items()
        if digest not in inventory.facts or not contradiction(layer, inventory.facts[digest])
    }
    for image_id, record in sorted(inventory.catalog.images.items()):
        for layer in dict.fromkeys(record.layers):
            if layer.compressed_digest not in known:
                sentence = f"layer {layer.compressed_digest} of image {image_id} has no entry in layer_db."
                yield Finding(Fault.MISSING, path, sentence, _REPAIR, layer.compressed_digest, (image_id,))
        yield from _image(inventory, record, certain)


def _image(
    inventory: Inventory, record: ImageRecord, certain: Mapping[Digest, StoredLayer]
) -> Iterator[Finding]:
    """An image says of its layers what layer_db says; one that we recorded has its config to the letter."""
    ours = any(image_id_of(name) == record.image_id for name in inventory.images)
    problem = metas_problem(record, certain, of_another_program=not ours)
    if problem:
        path = inventory.path(FILE_NAME)
        yield Finding(Fault.CORRUPT, path, f"image {record.image_id} was altered: {problem}.", _START)
    for name in inventory.images:
        if image_id_of(name) == record.image_id:
            path = inventory.path("images", name)
            try:
                kept, _ = read_copy(path, record.image_id)
            except (Unreadable, OSError) as error:
                sentence = f"{path}, the copy of image {record.image_id}, cannot be used: {error}."
                yield Finding(Fault.CORRUPT, path, sentence, _RESTORE)
                continue
            if _meaning(kept.config) != _meaning(record.config):
                path = inventory.path(FILE_NAME)
                sentence = f"the image_config of image {record.image_id} is not the one that its id names."
                yield Finding(Fault.CORRUPT, path, sentence, _RESTORE)


def _meaning(config: bytes) -> tuple[object, ...]:
    """What an image config says to us, however it is written: other programs write it anew in their own way."""
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
            layer = inventory.catalog.layers.get(Digest(text))
            if layer is None or not is_directory(inventory.paths.local(layer)):
                sentence = f"layer {text} of bundle {bundle.bundle_path} is not there."
                yield Finding(Fault.MISSING, inventory.path("overlay", name), sentence, "Release the bundle.")
    for name in inventory.unreadable:
        path = inventory.path("overlay", name)
        sentence = f"{path} belongs to a bundle, but its bundle.json cannot be read."
        yield Finding(
            Fault.CORRUPT, path, sentence, "Unmount the bundle that it is mounted at, and delete it."
        )


def _overlays(inventory: Inventory) -> Iterator[Finding]:
    overlay = overlay_in(inventory.work_dir, inventory.paths, inventory.catalog.layers.values())
    if overlay is not None:
        yield Finding(Fault.NOTE, overlay, f"{overlay} {WORK_DIR_SPOILED}.", f"{WORK_DIR_REMEDY}.")


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
        yield Finding(Fault.INCOMPLETE, path, f"{path} is of a bundle that was not finished.", _COLLECT)


def _foreign(inventory: Inventory) -> Iterator[Finding]:
    if inventory.owner is None:
        for path in inventory.strays():
            yield Finding(Fault.FOREIGN, path, f"{path} belongs to no layer.", _COLLECT)
        for path in inventory.orphans():
            yield Finding(Fault.FOREIGN, path, f"{path}: what it tells of is gone.", _COLLECT)
        for path in inventory.foreign():
            yield Finding(Fault.FOREIGN, path, f"{path} is none of ours.", _COLLECT)
    for name in inventory.strange:
        path = inventory.path("overlay", name)
        yield Finding(Fault.FOREIGN, path, f"{path} is none of ours.", _LOOK)
    for name in inventory.unknown:
        path = inventory.path(name)
        yield Finding(Fault.NOTE, path, f"{path} is none of ours.", _LOOK)
