"""The store with a real kernel: bundles that are mounted, and stores on read-only file systems."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestpull_server.errors import (
    BundleBusy,
    BundleExists,
    InvalidStore,
    LayerInUse,
    ReadOnlyImage,
    StorageFailed,
)
from guestpull_server.models import Digest, StoredImage
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Fault, Store, audit, collect_garbage
from support.bundles import mount_layers
from support.images import file, image, layer
from support.stores import pulled, put_layer, write_config

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


@contextmanager
def opened(work_dir: Path, *, additional_stores: tuple[Path, ...] = ()) -> Iterator[Store]:
    store = Store.open(
        str(work_dir), OverlayMounts(), additional_stores=[str(one) for one in additional_stores]
    )
    try:
        yield store
    finally:
        store.close()


def mounted_bundle(store: Store, stored: StoredImage, path: Path) -> Path:
    """A bundle that is mounted; returns its rootfs."""
    with store.reserve_bundle(str(path)) as bundle:
        mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
        bundle.commit(stored)
        return Path(bundle.rootfs)


def test_a_bundle_stays_mounted_over_restarts_and_is_released(disk: Path) -> None:
    with opened(disk / "work") as store:
        rootfs = mounted_bundle(store, pulled(store, SHOP, LATEST), disk / "bundle")
        (rootfs / "written").write_bytes(b"x")

    with opened(disk / "work") as store:
        assert [bundle.mounted for bundle in store.bundles()] == [True]
        assert (rootfs / "one").read_bytes() == TOP.tar
        assert (rootfs / "written").read_bytes() == b"x"
        store.release_bundle(str(disk / "bundle"))

    assert not (disk / "bundle").exists()
    assert os.listdir(disk / "work/overlay") == []
    assert not os.path.ismount(rootfs)


def test_a_bundle_that_is_in_use_stays(disk: Path) -> None:
    with opened(disk / "work") as store:
        rootfs = mounted_bundle(store, pulled(store, SHOP, LATEST), disk / "bundle")
        with (rootfs / "one").open("rb"), pytest.raises(BundleBusy):
            store.release_bundle(str(disk / "bundle"))
        assert [bundle.mounted for bundle in store.bundles()] == [True]

        store.release_bundle(str(disk / "bundle"))


def test_a_bundle_that_fails_is_taken_away_even_where_somebody_looks_into_it(disk: Path) -> None:
    with opened(disk / "work") as store:
        stored = pulled(store, SHOP, LATEST)
        with store.reserve_bundle(str(disk / "bundle")) as bundle:
            mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
            looking = os.open(f"{bundle.rootfs}/one", os.O_RDONLY)
            # left without a commit, as by an error

        assert os.read(looking, len(TOP.tar)) == TOP.tar
        os.close(looking)
        assert os.listdir(disk / "work/overlay") == []
        mounted_bundle(store, stored, disk / "bundle")
        store.release_bundle(str(disk / "bundle"))


def test_a_pull_that_was_killed_after_it_mounted_is_undone(disk: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            store = Store.open(str(disk / "work"), OverlayMounts())
            stored = pulled(store, SHOP, LATEST)
            bundle = store.reserve_bundle(str(disk / "bundle"))
            mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
            write_config(bundle)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert os.path.ismount(disk / "bundle/rootfs")

    with opened(disk / "work") as store:
        assert store.bundles() == ()
        assert not (disk / "bundle").exists()
        assert len(store.images()) == 1
        mounted_bundle(store, store.images()[0], disk / "bundle")
        store.release_bundle(str(disk / "bundle"))


def test_a_mounted_rootfs_of_somebody_else_is_refused_and_left_alone(disk: Path) -> None:
    rootfs = disk / "bundle/rootfs"
    rootfs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "theirs", str(rootfs)], check=True)
    try:
        with opened(disk / "work") as store, pytest.raises(BundleExists, match="mounted"):
            store.reserve_bundle(str(disk / "bundle"))
        assert os.path.ismount(rootfs)
    finally:
        subprocess.run(["umount", str(rootfs)], check=True)


def test_a_layer_below_a_mounted_bundle_is_neither_replaced_nor_collected(disk: Path) -> None:
    with opened(disk / "work") as store:
        stored = pulled(store, SHOP, LATEST)
        rootfs = mounted_bundle(store, stored, disk / "bundle")
        store.remove_image(stored, None, force=True)
        with pytest.raises(LayerInUse):
            store.discard_layer(Digest(BASE.digest))

    assert collect_garbage(str(disk / "work"), OverlayMounts()) == ()
    assert (rootfs / "one").read_bytes() == TOP.tar

    with opened(disk / "work") as store:
        assert len(store.release_bundle(str(disk / "bundle")).layers) == 2


def test_a_bundle_behind_a_link_is_mounted_and_keeps_its_layers(disk: Path) -> None:
    (disk / "real").mkdir()
    (disk / "alias").symlink_to("real")
    with opened(disk / "work") as store:
        mounted_bundle(store, pulled(store, SHOP, LATEST), disk / "alias/bundle")

    with opened(disk / "work") as store:
        assert [bundle.mounted for bundle in store.bundles()] == [True]
        with pytest.raises(LayerInUse):
            store.discard_layer(Digest(BASE.digest))
        store.release_bundle(str(disk / "alias/bundle"))
        assert not os.path.ismount(disk / "real/bundle/rootfs")


@contextmanager
def mount(place: Path, *options: str) -> Iterator[None]:
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def with_its_own_mount_of_layers(work_dir: Path, *options: str) -> Iterator[None]:
    """Bind-mount layers/ of a store to itself, with options."""
    layers = str(work_dir / "layers")
    with mount(work_dir / "layers", "--bind", layers):
        subprocess.run(["mount", "-o", ",".join(["remount", "bind", *options]), layers], check=True)
        yield


def test_an_image_whose_layers_are_mounted_read_only_is_kept(disk: Path) -> None:
    with opened(disk / "work") as store:
        pulled(store, SHOP, LATEST)
        put_layer(store, SIDE)

    with with_its_own_mount_of_layers(disk / "work", "ro"):
        with opened(disk / "work") as store:
            stored = store.find_image(SHOP.image_id, None)
            assert all(store.is_read_only(one) and store.is_present(one) for one in stored.layers)
            with pytest.raises(ReadOnlyImage, match="read-only"):
                store.remove_image(stored, None, force=True)
            with pytest.raises(StorageFailed, match="mounted read-only"):
                store.discard_layer(Digest(BASE.digest))
            with pytest.raises(StorageFailed, match="mounted read-only"):
                put_layer(store, layer(file("new")))
            store.delete_unused([Digest(SIDE.digest)])
            assert store.find_image(SHOP.image_id, None) == stored
            bundle = mounted_bundle(store, stored, disk / "bundle")
            assert (bundle / "one").read_bytes() == TOP.tar
            store.release_bundle(str(disk / "bundle"))
        assert collect_garbage(str(disk / "work"), OverlayMounts()) == ()

    with opened(disk / "work") as store:
        assert len(store.layers()) == 3
        assert all(store.is_present(one) and not store.is_read_only(one) for one in store.layers())


def test_layers_that_are_mounted_read_only_go_before_those_where_they_were_made(disk: Path) -> None:
    with opened(disk / "made") as store:
        pulled(store, SHOP, LATEST)
    (disk / "work").mkdir()
    shutil.copy(disk / "made/meta_store.json", disk / "work")
    shutil.copytree(disk / "made/layers", disk / "work/layers")

    with with_its_own_mount_of_layers(disk / "work", "ro"), opened(disk / "work") as store:
        assert {Path(one.store_path).parent for one in store.layers()} == {disk / "work/layers"}


def test_layers_on_a_mount_of_their_own_are_deleted_where_they_are(disk: Path) -> None:
    with opened(disk / "work") as store:
        pulled(store, SHOP, LATEST)

    with with_its_own_mount_of_layers(disk / "work", "rw"), opened(disk / "work") as store:
        removal = store.remove_image(store.find_image(SHOP.image_id, None), None, force=False)

        assert len(removal.deleted_layers) == 2
        assert os.listdir(disk / "work/layers") == []
    assert audit(str(disk / "work")) == ()


@contextmanager
def below_an_overlay(lower: Path, place: Path) -> Iterator[None]:
    """What a guest sees of its root filesystem: the image, with a tmpfs above it."""
    for name in ("upper", "scratch"):
        (place.parent / name).mkdir()
    options = f"lowerdir={lower},upperdir={place.parent}/upper,workdir={place.parent}/scratch"
    with mount(place, "-t", "overlay", "overlay", "-o", options):
        yield


def test_a_store_that_is_seen_through_an_overlay_is_refused(disk: Path) -> None:
    with opened(disk / "image/store") as store:
        pulled(store, SHOP, LATEST)

    with below_an_overlay(disk / "image", disk / "root"):
        with (
            pytest.raises(InvalidStore, match=r"overlayfs.*bind-mount"),
            opened(disk / "work", additional_stores=(disk / "root/store",)),
        ):
            pass
        with (
            mount(disk / "root/store", "--bind", str(disk / "image/store")),
            opened(disk / "work", additional_stores=(disk / "root/store",)) as store,
        ):
            assert len(store.images()) == 1


def test_a_work_directory_on_an_overlay_is_told_of(disk: Path) -> None:
    (disk / "image").mkdir()

    with below_an_overlay(disk / "image", disk / "root"):
        with opened(disk / "root/work") as store:
            (warning,) = store.warnings
        assert "overlayfs" in warning
        assert "additional_stores" in warning
        (finding,) = audit(str(disk / "root/work"))
        assert finding.fault is Fault.NOTE
        assert finding.sentence.rstrip(".") in warning


def test_a_work_directory_whose_entries_lead_to_an_overlay_is_told_of(disk: Path) -> None:
    with opened(disk / "image/store") as store:
        pulled(store, SHOP, LATEST)
    (disk / "work").mkdir()
    entries = (disk / "image/store/meta_store.json").read_text()
    (disk / "work/meta_store.json").write_text(entries.replace(f"{disk}/image", f"{disk}/root"))

    with below_an_overlay(disk / "image", disk / "root"), opened(disk / "work") as store:
        (warning,) = store.warnings

    assert f"{disk}/root/store/layers" in warning


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_layers_of_a_read_only_file_system_are_mounted(disk: Path, kind: str) -> None:
    baked = disk / "baked"
    store = Store.open(str(baked), OverlayMounts(), guest_work_dir="/run/kata-containers/image")
    pulled(store, SHOP, LATEST)
    store.close(tidy=True)
    made = disk / "made"
    if kind == "squashfs":
        command = ["mksquashfs", str(baked), str(made), "-quiet", "-no-progress"]
    else:
        command = ["mkfs.erofs", str(made), str(baked)]
    subprocess.run(command, check=True, capture_output=True)
    place = disk / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", kind, "-o", "loop,ro", str(made), str(place)], check=True)
    try:
        with opened(disk / "work", additional_stores=(place,)) as store:
            stored = pulled(store, SHOP, LATEST)
            assert stored.read_only_store == str(place)
            rootfs = mounted_bundle(store, stored, disk / "bundle")
            assert (rootfs / "one").read_bytes() == TOP.tar
            (rootfs / "one").write_bytes(b"changed")
            store.release_bundle(str(disk / "bundle"))
            assert os.listdir(disk / "work/layers") == []
        assert audit(str(place), "/run/kata-containers/image") == ()
    finally:
        subprocess.run(["umount", str(place)], check=True)
