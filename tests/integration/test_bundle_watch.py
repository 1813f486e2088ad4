"""Bundles that others take away without a call, as kata-agent does, are released; those alive never are."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_client.errors import NotFound
from guestpull_server.config import Configuration
from guestpull_server.models import StoredImage
from guestpull_server.puller import Puller
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Store
from guestpull_server.upkeep.bundle_watch import BundleWatch
from support.bundles import mount_layers
from support.daemon import Daemon, mounts_below
from support.images import file, image, layer
from support.namespaces import MountNamespace
from support.peers import run
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.stores import pulled
from support.waiting import until

SHOP = image(layer(file("a")))


def take_away(bundle: Path) -> None:
    """What kata-agent does at a container's end."""
    run("umount", "--lazy", str(bundle / "rootfs"))
    shutil.rmtree(bundle)


@pytest.fixture
def store(disk: Path) -> Iterator[Store]:
    """A store that nothing watches."""
    opened = Store.open(str(disk / "work"), OverlayMounts())
    yield opened
    opened.close()


@pytest.fixture
def shop(store: Store) -> StoredImage:
    return pulled(store, SHOP, "docker.io/library/shop:latest")


def mounted(store: Store, stored: StoredImage, path: Path) -> Path:
    """Have a bundle; returns its rootfs."""
    with store.reserve_bundle(str(path)) as bundle:
        mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
        bundle.commit(stored)
        return Path(bundle.rootfs)


def is_released(store: Store) -> bool:
    return store.bundles() == () and os.listdir(f"{store.work_dir}/overlay") == []


# -- in a daemon -----------------------------------------------------------------------------------------------


def test_a_bundle_that_is_taken_away_is_released_and_logged(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("kata:1", image(runnable()))
    gone, stays = daemon.bundle("gone"), daemon.bundle("stays")
    for bundle in (gone, stays):
        daemon.client.pull(reference, str(bundle))
    (gone / "rootfs/written").write_text("x")

    take_away(gone)

    until("the bundle is released", lambda: len(daemon.client.bundles()) == 1)
    found = daemon.await_log(r"warning a bundle whose rootfs is gone was released bundle=(\S+)")
    assert found[1] == str(gone)
    assert len(os.listdir(daemon.work_dir / "overlay")) == 1
    assert daemon.client.images()[0].bundles == (str(stays),)
    assert (stays / "rootfs/etc/passwd").exists()
    with pytest.raises(NotFound):
        daemon.client.release_bundle(str(gone))


def test_its_layers_go_if_its_image_was_removed_before(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("kata:1", image(runnable()))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.remove_image(reference, force=True)

    take_away(daemon.bundle("one"))

    until("the layer is deleted", lambda: os.listdir(daemon.work_dir / "layers") == [])
    assert daemon.client.layers() == ()


def test_its_path_is_free_for_the_next_pull(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("kata:1", image(runnable()))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    take_away(daemon.bundle("one"))
    until("the bundle is released", lambda: daemon.client.bundles() == ())

    pulled_again = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert Path(pulled_again.rootfs_path, "etc/passwd").exists()


def test_what_was_taken_away_while_no_daemon_ran_is_released_at_its_start(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("kata:1", image(runnable()))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.stop()
    take_away(daemon.bundle("one"))

    daemon.start()

    until("the bundle is released", lambda: daemon.client.bundles() == ())
    assert os.listdir(daemon.work_dir / "overlay") == []


def test_a_container_keeps_its_bundle_until_it_ends(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("kata:1", image(runnable()))
    bundle = daemon.bundle("one")
    daemon.client.pull(reference, str(bundle))
    other = daemon.bundle("other")
    daemon.client.pull(reference, str(other))

    with MountNamespace(daemon.disk, f"mount --bind {bundle}/rootfs /mnt") as container:
        take_away(bundle)
        take_away(other)
        # both have been looked at once the other one is released
        until("the other one is released", lambda: len(daemon.client.bundles()) == 1)
        assert "bin" in container.run("ls", "/mnt")
        (overlay,) = (daemon.work_dir / "overlay").iterdir()
        assert (overlay / "upper").is_dir()

    until("the bundle is released", lambda: daemon.client.bundles() == ())


def test_a_bundle_of_a_work_directory_that_was_replaced_is_released(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("kata:1", image(runnable()))
    shutil.rmtree(daemon.work_dir)
    daemon.client.pull(reference, str(daemon.bundle("one")))

    take_away(daemon.bundle("one"))

    until("the bundle is released", lambda: daemon.client.bundles() == ())


# -- which bundles are abandoned -------------------------------------------------------------------------------


def test_a_bundle_that_is_mounted_is_alive(store: Store, shop: StoredImage, disk: Path) -> None:
    mounted(store, shop, disk / "bundle")

    assert store.abandoned_bundles() == ()
    store.release_bundle(str(disk / "bundle"))


def test_after_a_reboot_a_bundle_whose_directory_is_there_stays(
    store: Store, shop: StoredImage, disk: Path
) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    run("umount", str(rootfs))

    assert store.abandoned_bundles() == ()
    store.release_bundle(str(disk / "bundle"))


def test_a_bundle_whose_rootfs_became_a_file_or_a_link_is_abandoned(
    store: Store, shop: StoredImage, disk: Path
) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    run("umount", str(rootfs))
    rootfs.rmdir()
    rootfs.symlink_to("/")

    (abandoned,) = store.abandoned_bundles()

    assert store.release_abandoned_bundle(abandoned) is not None
    assert is_released(store)
    assert rootfs.is_symlink()


def test_what_is_left_of_its_directory_is_its_owner_s(store: Store, shop: StoredImage, disk: Path) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    run("umount", str(rootfs))
    rootfs.rmdir()
    (disk / "bundle/config.json").write_text("somebody else's by now")

    (abandoned,) = store.abandoned_bundles()
    store.release_abandoned_bundle(abandoned)

    assert is_released(store)
    assert (disk / "bundle/config.json").read_text() == "somebody else's by now"


def test_a_bundle_that_is_there_again_is_not_released(store: Store, shop: StoredImage, disk: Path) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    take_away(disk / "bundle")
    (abandoned,) = store.abandoned_bundles()
    rootfs.mkdir(parents=True)

    assert store.release_abandoned_bundle(abandoned) is None

    assert len(store.bundles()) == 1
    store.release_bundle(str(disk / "bundle"))


def test_an_open_file_keeps_a_bundle_that_was_taken_away(store: Store, shop: StoredImage, disk: Path) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    opened = os.open(rootfs / "one", os.O_RDONLY)
    take_away(disk / "bundle")
    (abandoned,) = store.abandoned_bundles()

    assert store.release_abandoned_bundle(abandoned) is None
    os.close(opened)

    assert store.release_abandoned_bundle(abandoned) is not None
    assert is_released(store)


def test_a_file_system_that_was_detached_with_a_bundle_on_it_keeps_the_bundle_as_long_as_it_is_used(
    store: Store, shop: StoredImage, disk: Path
) -> None:
    (disk / "other").mkdir()
    run("mount", "-t", "tmpfs", "other", str(disk / "other"))
    rootfs = mounted(store, shop, disk / "other/bundle")
    with subprocess.Popen(["sh", "-c", "read end"], cwd=rootfs, stdin=subprocess.PIPE) as user:
        run("umount", "--lazy", "--recursive", str(disk / "other"))
        (abandoned,) = store.abandoned_bundles()
        assert store.release_abandoned_bundle(abandoned) is None
        user.communicate(b"\n")

    assert store.release_abandoned_bundle(abandoned) is not None
    assert is_released(store)


def test_of_two_who_release_it_one_does(store: Store, shop: StoredImage, disk: Path) -> None:
    mounted(store, shop, disk / "bundle")
    take_away(disk / "bundle")
    (abandoned,) = store.abandoned_bundles()

    store.release_bundle(str(disk / "bundle"))

    assert store.release_abandoned_bundle(abandoned) is None
    assert is_released(store)


# -- when it is looked -----------------------------------------------------------------------------------------


def test_a_directory_that_is_removed_long_after_its_unmount_is_noticed(
    store: Store, shop: StoredImage, disk: Path
) -> None:
    rootfs = mounted(store, shop, disk / "bundle")
    run("umount", str(rootfs))
    watch = BundleWatch(store)  # no mount changes from now on
    shutil.rmtree(disk / "bundle")

    until("the bundle is released", lambda: is_released(store))

    watch.close()


def test_a_watch_ends_when_it_is_closed(store: Store) -> None:
    watch = BundleWatch(store)
    assert "bundle-watch" in {thread.name for thread in threading.enumerate()}

    watch.close()
    watch.close()

    assert "bundle-watch" not in {thread.name for thread in threading.enumerate()}


def test_a_watch_of_a_store_that_was_closed_does_no_harm(store: Store, shop: StoredImage, disk: Path) -> None:
    mounted(store, shop, disk / "bundle")
    store.close()
    watch = BundleWatch(store)
    take_away(disk / "bundle")
    watch.close()

    with Puller.open(Configuration(work_dir=store.work_dir)) as puller:
        assert len(puller.store.bundles()) == 1  # nobody watches who does not serve
        puller.store.release_bundle(str(disk / "bundle"))
    assert mounts_below(disk) == []
