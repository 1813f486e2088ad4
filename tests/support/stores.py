"""Stores without registries, tars and mounts: does what a pull does with the store room.

store = open_store(tmp_path)
shop = pulled(store, image(layer(file("a")), layer(file("b"))), "docker.io/library/shop:latest")
bundle = bundled(store, shop, "/bundles/one")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from guestpull_server.config import LayerNames
from guestpull_server.errors import StorageFailed, storage_errors
from guestpull_server.models import (
    Decoder,
    Descriptor,
    Digest,
    LayerDescriptor,
    ResolvedImage,
    StoredImage,
    StoredLayer,
    UnpackedLayer,
)
from guestpull_server.platforms import Platform
from guestpull_server.store import BundleReservation, Store
from guestpull_server.store.bundle_making import READY, read_bundle_file
from support import bundles
from support.images import Image, Layer

AMD64: Final = Platform("linux", "amd64")


class MountsInMemory:
    """A fake kernel that records mounts."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self.busy: set[str] = set()
        self.stuck: set[str] = set()

    def mounted(self) -> frozenset[str]:
        """The mount points."""
        return frozenset(self.places)

    def is_used(self, overlay_directory: str) -> bool:
        """Whether the bundle that an overlay directory belongs to is mounted or busy."""
        found = read_bundle_file(overlay_directory, READY)
        return found is not None and f"{found.real_path}/rootfs" in self.places | self.busy

    def unmount(self, rootfs: str | None, _overlay_directory: str) -> tuple[str, ...]:
        """Unmount, unless it is busy."""
        if rootfs is None:
            return ()
        rootfs = os.path.realpath(rootfs)
        if rootfs in self.busy:
            return ("somebody",)
        self.places.discard(rootfs)
        return ()

    def detach(self, rootfs: str, _overlay_directory: str) -> None:
        """Unmount, busy or not, unless it is stuck."""
        rootfs = os.path.realpath(rootfs)
        if rootfs in self.stuck:
            raise StorageFailed("unmounting", rootfs, "Input/output error")
        self.places.discard(rootfs)


def open_store(
    work_dir: Path,
    mounts: MountsInMemory | None = None,
    *,
    guest_work_dir: str | None = None,
    additional_stores: Sequence[Path] = (),
    bundle_roots: Sequence[Path] = (),
    layer_names: LayerNames | None = None,
) -> Store:
    """Open a store; the caller closes it."""
    return Store.open(
        str(work_dir),
        mounts or MountsInMemory(),
        guest_work_dir=guest_work_dir,
        additional_stores=[str(one) for one in additional_stores],
        bundle_roots=[str(one) for one in bundle_roots],
        layer_names=layer_names,
    )


def unpacked(layer: Layer) -> UnpackedLayer:
    """The result that a layer worker would return for a layer."""
    return UnpackedLayer(
        diff_id=Digest(layer.diff_id),
        decoder=Decoder.GZIP,
        size_bytes=2 * len(layer.tar),
        entries=2,
        implied_directories=(b"usr", b"\xff\xfe"),
        dropped_xattrs=0,
    )


def put_layer(store: Store, layer: Layer, record: bytes | None = None) -> StoredLayer:
    """Add a layer to the store: two files with its tar, so that a half-deleted layer can be recognised."""
    with store.stage(Digest(layer.digest)) as staged:
        for name in ("one", "two"):
            Path(staged.directory, name).write_bytes(layer.tar)
        if record is not None:
            Path(staged.tar_split_path).write_bytes(record)
        return store.commit_layer(staged, Digest(layer.digest), unpacked(layer))


def lose_metadata(work_dir: Path) -> None:
    """Delete the metadata of all layers, so that they look like layers of another program."""
    for path in (work_dir / "records").glob("*.json"):
        path.unlink()


def is_whole(directory: str, layer: Layer) -> bool:
    """Whether a directory has the complete content from `put_layer`."""
    return sorted(os.listdir(directory)) == ["one", "two"] and all(
        Path(directory, name).read_bytes() == layer.tar for name in ("one", "two")
    )


def resolved(image: Image, reference: str) -> ResolvedImage:
    """The image as resolved by the registry room."""
    layers = tuple(
        LayerDescriptor(Descriptor(one.media_type, Digest(one.digest), one.size), Digest(one.diff_id))
        for one in image.layers
    )
    return ResolvedImage(reference, Digest(image.digest), Digest(image.image_id), image.config, layers)


def pulled(store: Store, image: Image, reference: str) -> StoredImage:
    """Add an image to the store, as a pull does; layers in the store are not added again."""
    with store.pin(Digest(one.digest) for one in image.layers):
        layers = [store.layer(Digest(one.digest)) or put_layer(store, one) for one in image.layers]
        return store.record_image(resolved(image, reference), layers)


def write_config(bundle: BundleReservation) -> None:
    """Write a bundle's config.json, as a pull does."""
    bundles.write_config(bundle.bundle_path, b"{}", bundle.writes_config)


def bundled(store: Store, image: StoredImage, bundle_path: Path | str, mounts: MountsInMemory) -> str:
    """Create and mount a bundle of an image; return its path."""
    with store.reserve_bundle(str(bundle_path)) as bundle:
        with storage_errors("preparing the mount", bundle.overlay_directory):
            for name in ("upper", "work"):
                os.mkdir(os.path.join(bundle.overlay_directory, name))
        mounts.places.add(bundle.rootfs)
        write_config(bundle)
        bundle.commit(image)
        return bundle.bundle_path
