"""A bundle that somebody on the machine uses is not released: nothing of it is deleted, and it stays a bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestpull_client.errors import FailedPrecondition
from guestpull_server.errors import BundleBusy, LayerInUse
from guestpull_server.models import Digest, StoredImage
from guestpull_server.snapshot import OverlayMounts, mounts
from guestpull_server.snapshot.syscalls import unmount
from guestpull_server.store import Store
from support.bundles import mount_layers
from support.daemon import Daemon, Tmpfs, mounts_below
from support.images import file, image, layer
from support.namespaces import MountNamespace
from support.peers import run
from support.samples import BUSYBOX, runnable
from support.simulator import RegistrySimulator
from support.stores import pulled
from support.waiting import PATIENCE, until

BASE, TOP = layer(file("a")), layer(file("b"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


class Place:
    """A store with one bundle, which is mounted and has a file that was written in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bundle = directory / "bundle"
        self.rootfs = self.bundle / "rootfs"
        self.store = Store.open(str(directory / "work"), OverlayMounts())
        self.image: StoredImage = pulled(self.store, SHOP, LATEST)
        with self.store.reserve_bundle(str(self.bundle)) as bundle:
            mount_layers(self.image.layers, bundle.overlay_directory, bundle.rootfs)
            bundle.commit(self.image)
        (self.rootfs / "written").write_text("by the container")

    def refused(self) -> str:
        """Release the bundle, which must fail and delete nothing; returns what the error says."""
        with pytest.raises(BundleBusy) as caught:
            self.store.release_bundle(str(self.bundle))
        (overlay,) = (self.directory / "work/overlay").iterdir()
        assert (overlay / "upper/written").read_text() == "by the container"
        assert [one.bundle_path for one in self.store.bundles()] == [str(self.bundle)]
        return str(caught.value)

    def release(self) -> None:
        """Release the bundle, which must succeed and leave nothing."""
        self.store.release_bundle(str(self.bundle))
        assert not self.bundle.exists()
        assert os.listdir(self.directory / "work/overlay") == []
        assert mounts_below(self.directory) == []


@contextmanager
def ext4(directory: Path) -> Iterator[Path]:
    """An ext4 file system, in a file."""
    device = directory / "ext4.img"
    run("truncate", "--size=32M", str(device))
    run("mkfs.ext4", "-q", "-F", str(device))
    place = directory / "ext4"
    place.mkdir()
    run("mount", "-o", "loop", str(device), str(place))
    try:
        yield place
    finally:
        run("umount", str(place))


@pytest.fixture
def place(disk: Path) -> Iterator[Place]:
    made = Place(disk)
    yield made
    made.store.close()


@pytest.fixture(params=["tmpfs", "ext4"])
def place_on_each(disk: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """On each kind of file system that upper directories usually lie on."""
    if request.param == "tmpfs":
        made = Place(disk)
        yield made
        made.store.close()
        return
    with ext4(disk) as directory:
        made = Place(directory)
        yield made
        made.store.close()


def test_a_bundle_whose_container_runs_is_not_released(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("running:1", image(runnable(), process={"Cmd": ["sleep", "1000"]}))
    bundle = daemon.bundle("one")
    rootfs = Path(daemon.client.pull(reference, str(bundle)).rootfs_path)
    name = f"guestpull-test-{os.getpid()}"
    container = subprocess.Popen(["runc", "run", "--bundle", str(bundle), name], stdin=subprocess.DEVNULL)
    try:
        until("the container runs", lambda: run("runc", "exec", name, "true", check=False).returncode == 0)
        run("runc", "exec", name, "sh", "-c", "echo kept >/written")

        with pytest.raises(FailedPrecondition, match=r"process \d+ \(sleep\).*at /") as busy:
            daemon.client.release_bundle(str(bundle))
        with pytest.raises(FailedPrecondition) as used:
            daemon.client.remove_image(reference)

        assert (busy.value.reason, used.value.reason) == ("BUNDLE_BUSY", "IMAGE_IN_USE")
        assert daemon.client.bundles()[0].mounted
        assert (rootfs / "written").read_text() == "kept\n"
        assert run("runc", "exec", name, "cat", "/etc/group", "/written").stdout.endswith("kept\n")
    finally:
        run("runc", "kill", name, "KILL", check=False)
        container.wait(PATIENCE)
        run("runc", "delete", "--force", name, check=False)
    daemon.client.release_bundle(str(bundle))
    assert not bundle.exists()
    assert len(daemon.client.remove_image(reference).deleted_layers) == 1


def test_the_process_whose_namespace_has_the_rootfs_mounted_is_named(place: Place) -> None:
    with MountNamespace(place.directory) as elsewhere:
        assert f"process {elsewhere.pid} (sh) has it mounted at {place.rootfs}" in place.refused()
        assert os.path.ismount(place.rootfs)
        assert elsewhere.run("cat", f"{place.rootfs}/written") == "by the container"
    place.release()


def test_a_container_that_the_host_has_unmounted_keeps_its_bundle(place: Place) -> None:
    with MountNamespace(place.directory) as elsewhere:
        run("umount", str(place.rootfs))
        assert f"process {elsewhere.pid}" in place.refused()
        assert elsewhere.run("cat", f"{place.rootfs}/written") == "by the container"
    place.release()


def test_a_container_whose_bundle_s_directory_is_gone_keeps_its_bundle(place: Place) -> None:
    with MountNamespace(place.directory, f"mount --bind {place.rootfs} /mnt") as elsewhere:
        run("umount", str(place.rootfs))
        place.rootfs.rmdir()
        place.bundle.rmdir()
        assert f"process {elsewhere.pid} (sh) has it mounted at /mnt" in place.refused()
    place.release()


def test_a_namespace_is_looked_into_from_each_root_directory_of_its_processes(place: Place) -> None:
    root = place.directory / "root"
    root.mkdir()
    shutil.copy(BUSYBOX, root)
    # what is mounted outside of a process's root directory is not in its list
    script = f"exec chroot {root} /busybox sh -c 'echo ready && read end'"
    with MountNamespace(place.directory, script) as elsewhere:
        enter = ["nsenter", f"--mount=/proc/{elsewhere.pid}/ns/mnt", "sh", "-c", "echo ready && read end"]
        with subprocess.Popen(enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            assert f"process {other.pid} (sh) has it mounted" in place.refused()
            other.communicate(b"\n")
    place.release()


def test_a_bind_mount_of_the_rootfs_is_named_by_its_place(place: Place) -> None:
    elsewhere = place.directory / "elsewhere"
    elsewhere.mkdir()
    run("mount", "--bind", str(place.rootfs), str(elsewhere))

    assert f"it is mounted at {elsewhere}" in place.refused()

    assert (elsewhere / "written").exists()
    assert os.path.ismount(place.rootfs)
    run("umount", str(elsewhere))
    place.release()


@pytest.mark.parametrize("below", ["", "a-directory"], ids=["on it", "below it"])
def test_a_mount_on_the_rootfs_or_below_it_is_named_and_stays(place: Place, below: str) -> None:
    point = place.rootfs / below
    point.mkdir(exist_ok=True)
    for number in range(2):
        run("mount", "-t", "tmpfs", f"theirs{number}", str(point))

    assert f"tmpfs 'theirs0' is mounted at {point}" in place.refused()

    assert mounts_below(place.directory).count(str(point)) == (2 if below else 3)
    run("umount", str(point))
    place.refused()
    run("umount", str(point))
    place.release()


def test_a_rootfs_that_is_mounted_on_itself_is_named_and_stays(place: Place) -> None:
    run("mount", "--bind", str(place.rootfs), str(place.rootfs))

    assert f"it is mounted at {place.rootfs}" in place.refused()

    run("umount", str(place.rootfs))
    place.release()


def test_a_file_that_is_open_in_a_detached_mount_keeps_the_bundle(place_on_each: Place) -> None:
    opened = os.open(place_on_each.rootfs / "written", os.O_RDONLY)
    run("umount", "--lazy", str(place_on_each.rootfs))

    assert "an open file" in place_on_each.refused()

    assert os.read(opened, 100) == b"by the container"
    os.close(opened)
    place_on_each.release()


def test_a_namespace_without_a_process_keeps_the_bundle(place_on_each: Place) -> None:
    with MountNamespace(place_on_each.directory) as elsewhere:
        namespace = os.open(f"/proc/{elsewhere.pid}/ns/mnt", os.O_RDONLY)
    place_on_each.refused()
    os.close(namespace)
    place_on_each.release()


def test_a_store_s_files_are_as_they_were_after_a_refusal(place_on_each: Place) -> None:
    (overlay,) = (place_on_each.directory / "work/overlay").iterdir()
    upper = overlay / "upper"
    before = os.listxattr(upper), sorted(os.listdir(upper))
    with MountNamespace(place_on_each.directory):
        place_on_each.refused()
    assert (os.listxattr(upper), sorted(os.listdir(upper))) == before
    place_on_each.release()


@pytest.mark.parametrize("propagation", ["slave", "shared"])
def test_a_copy_that_propagation_made_goes_with_the_rootfs(tmp_path: Path, propagation: str) -> None:
    with Tmpfs(tmp_path / "disk") as disk:
        run("mount", "--make-shared", str(disk))
        (disk / "peer").mkdir()
        with MountNamespace(disk, propagation=propagation) as elsewhere:
            place = Place(disk)
            assert elsewhere.run("cat", f"{place.rootfs}/written") == "by the container"
            place.release()
            assert str(place.rootfs) not in elsewhere.run("cat", "/proc/self/mountinfo")
            place.store.close()


def test_a_copy_that_propagation_made_and_somebody_mounted_on_is_in_use(tmp_path: Path) -> None:
    with Tmpfs(tmp_path / "disk") as disk:
        run("mount", "--make-shared", str(disk))
        with MountNamespace(disk, propagation="slave") as elsewhere:
            place = Place(disk)
            elsewhere.run("mount", "-t", "tmpfs", "theirs", str(place.rootfs))
            assert (
                f"process {elsewhere.pid} (sh) has tmpfs 'theirs' mounted at {place.rootfs}"
                in place.refused()
            )
            assert os.path.ismount(place.rootfs)
        place.release()
        place.store.close()


def test_a_container_that_starts_while_its_bundle_is_unmounted_keeps_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = MountNamespace(place.directory)
    started: list[int] = []

    def unmount_late(path: str) -> None:
        if not started:
            started.append(container.__enter__().pid)
        unmount(path)

    with monkeypatch.context() as kernel:
        kernel.setattr(mounts, "unmount", unmount_late)
        assert f"process {started[0] if started else ''}" in place.refused()

    assert container.run("cat", f"{place.rootfs}/written") == "by the container"
    container.end()
    place.release()


def test_a_layer_of_a_container_that_the_host_has_unmounted_is_not_replaced(place: Place) -> None:
    with MountNamespace(place.directory):
        run("umount", str(place.rootfs))
        with pytest.raises(LayerInUse):
            place.store.discard_layer(Digest(BASE.digest))
    place.release()


def test_a_failed_pull_leaves_no_mount_although_somebody_mounted_on_its_rootfs(place: Place) -> None:
    with place.store.reserve_bundle(str(place.directory / "failed")) as bundle:
        mount_layers(place.image.layers, bundle.overlay_directory, bundle.rootfs)
        run("mount", "-t", "tmpfs", "theirs", bundle.rootfs)
        # left without a commit, as by an error

    assert mounts_below(place.directory) == [str(place.rootfs)]
    assert not (place.directory / "failed").exists()
    place.release()
