"""The undo of a pull that failed: the caller sees why the pull failed, and nothing is left of it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from guestpull_client.errors import ResourceExhausted
from guestpull_server.errors import InvalidRequest
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Store
from support.bundles import mount_layers
from support.daemon import Daemon
from support.faults import Corrupt
from support.images import Json, directory, file, image, layer, symlink
from support.peers import run
from support.simulator import RegistrySimulator
from support.stores import pulled

_PULL = """
import sys
from guestpull_server import PullRequest, Puller
from guestpull_server.config import Configuration, Limits
from guestpull_server.errors import GuestpullError

work_dir, *pulls = sys.argv[1:]
with Puller.open(Configuration(work_dir=work_dir, limits=Limits(max_attempts=1))) as puller:
    for image, bundle in zip(pulls[::2], pulls[1::2]):
        try:
            puller.pull(PullRequest(image, bundle))
        except GuestpullError as error:
            print(error.reason)
"""


def test_without_cap_sys_admin_each_failure_keeps_its_own_reason(
    disk: Path, registry: RegistrySimulator
) -> None:
    corrupt, whole = layer(file("corrupt")), layer(file("whole"))
    images = [
        registry.push("corrupt:1", image(corrupt)),
        "127.0.0.1:1/unreachable:1",
        registry.push("whole:1", image(whole)),
    ]
    registry.fault(corrupt, Corrupt())
    pulls = [text for number, one in enumerate(images) for text in (one, f"{disk}/bundle{number}")]

    without = ("setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin")
    command = (*without, sys.executable, "-c", _PULL, f"{disk}/work", *pulls)
    done = run(*command)

    assert done.stdout.split() == ["DIGEST_MISMATCH", "REGISTRY_UNAVAILABLE", "MOUNT_FAILED"]
    assert sorted(os.listdir(disk)) == ["work"]
    assert os.listdir(disk / "work/overlay") == []


def test_an_image_that_makes_its_bundle_too_costly_is_refused_and_leaves_none(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    """8 kB of layer and 20 kB of config kept a core busy for hours, past every deadline and SIGTERM."""
    deep = "d/" * 248
    hostile = layer(directory(deep.rstrip("/")), symlink(f"{deep}top", "/"), symlink("bottom", deep))
    through: dict[str, Json] = {f"{'bottom/top/' * 20}{number}": {} for number in range(90)}
    reference = registry.push("hostile:1", image(hostile, process={"Volumes": through}))

    with pytest.raises(ResourceExhausted, match="max_lookup_steps"):
        daemon.client.pull(reference, str(daemon.bundle("one")))

    assert not daemon.bundle("one").exists()
    assert os.listdir(daemon.work_dir / "overlay") == []


def test_an_undo_that_fails_is_logged_and_done_at_the_next_start(
    disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(path: str, *, detach: bool) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def fail_after_the_mount(kernel: pytest.MonkeyPatch) -> None:
        with store.reserve_bundle(str(disk / "bundle")) as bundle:
            mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
            kernel.setattr("guestpull_server.snapshot.mounts.unmount", refused)
            raise InvalidRequest("image_url", "the first error", "")

    store = Store.open(str(disk / "work"), OverlayMounts())
    stored = pulled(store, image(layer(file("a"))), "docker.io/library/shop:latest")
    with monkeypatch.context() as kernel, pytest.raises(InvalidRequest, match="the first error"):
        fail_after_the_mount(kernel)
    store.close()

    (record,) = caplog.records
    assert "Operation not permitted" in record.__dict__["fields"]["problem"]
    assert os.path.ismount(disk / "bundle/rootfs")

    Store.open(str(disk / "work"), OverlayMounts()).close()
    assert not (disk / "bundle").exists()
    assert os.listdir(disk / "work/overlay") == []
