"""Other users of the machine, and the directories that bundles are made in.

An image may hold setuid programs and devices: whoever can reach them by a path, or replace config.json before a
runtime reads it, is root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestpull_server.errors import InvalidBundlePath
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Store
from guestpull_server.store.bundle_paths import BundlePaths
from support.bundles import mount_layers
from support.images import file, image, layer
from support.stores import pulled

OTHER = 4242


@pytest.fixture
def store(open_disk: Path) -> Iterator[Store]:
    opened = Store.open(str(open_disk / "work"), OverlayMounts())
    yield opened
    opened.close()


def as_other(*command: object) -> None:
    """Run a command as another user of the machine."""
    subprocess.run([str(word) for word in command], user=OTHER, group=OTHER, extra_groups=[], check=True)


def made(path: Path, *, owner: int = 0, mode: int = 0o755) -> Path:
    path.mkdir(parents=True)
    os.chown(path, owner, owner)
    path.chmod(mode)
    return path


def refused(store: Store, bundle: Path) -> str:
    """Why a bundle is refused; nothing is made for it."""
    before = sorted(bundle.parent.rglob("*"))
    with pytest.raises(InvalidBundlePath) as caught:
        store.reserve_bundle(str(bundle))
    assert sorted(bundle.parent.rglob("*")) == before
    assert os.listdir(store.work_dir + "/overlay") == []
    return caught.value.problem


@pytest.mark.parametrize("bundle", ["theirs", "theirs/bundle", "theirs/ours/bundle"])
def test_no_bundle_is_made_in_a_directory_of_another_user(store: Store, open_disk: Path, bundle: str) -> None:
    theirs = made(open_disk / "theirs", owner=OTHER)
    made(theirs / "ours")

    problem = refused(store, open_disk / bundle)

    assert f"{theirs} belongs to user {OTHER}" in problem
    assert f"chown 0 {theirs}" in problem


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_no_bundle_is_made_where_other_users_may_replace_it(store: Store, open_disk: Path, mode: int) -> None:
    shared = made(open_disk / "shared", mode=mode)
    made(shared / "bundle", mode=0o700)

    problem = refused(store, shared / "bundle")

    assert f"other users may replace what is in {shared}" in problem
    assert f"chmod go-w {shared}" in problem


def test_no_bundle_is_made_where_a_group_of_others_may_replace_it(store: Store, open_disk: Path) -> None:
    shared = made(open_disk / "shared", mode=0o770)
    os.chown(shared, 0, OTHER)

    assert f"chmod go-w {shared}" in refused(store, shared / "bundle")


def test_a_sticky_directory_will_do_as_a_parent(store: Store, open_disk: Path) -> None:
    shared = made(open_disk / "shared", mode=0o1777)
    made(shared / "existing", mode=0o700)

    for name in ("existing", "new", "new-parent/new"):
        with store.reserve_bundle(str(shared / name)):
            assert (shared / name / "rootfs").is_dir()


def test_what_another_user_made_in_a_sticky_directory_is_refused(store: Store, open_disk: Path) -> None:
    shared = made(open_disk / "shared", mode=0o1777)
    made(open_disk / "ours")
    as_other("mkdir", shared / "bundle")
    as_other("ln", "-s", open_disk / "ours", shared / "link")

    assert f"{shared}/bundle belongs to user {OTHER}" in refused(store, shared / "bundle")
    assert f"{shared}/link belongs to user {OTHER}" in refused(store, shared / "link")
    assert f"{shared}/link belongs to user {OTHER}" in refused(store, shared / "link/bundle")
    assert os.listdir(open_disk / "ours") == []


def test_links_of_root_are_followed_as_far_as_they_lead_through_directories_of_root(
    store: Store, open_disk: Path
) -> None:
    ours, theirs = made(open_disk / "ours"), made(open_disk / "theirs", owner=OTHER)
    (open_disk / "good").symlink_to("./ours/../ours")
    (open_disk / "bad").symlink_to(theirs)
    (open_disk / "by-way-of-bad").symlink_to("bad/../ours")

    with store.reserve_bundle(str(open_disk / "good/bundle")):
        assert (ours / "bundle/rootfs").is_dir()
    for link in ("bad", "by-way-of-bad"):
        assert f"{theirs} belongs to user {OTHER}" in refused(store, open_disk / link / "bundle")


@pytest.mark.parametrize(
    "plant",
    [
        lambda place, _ours: as_other("mkdir", place),
        lambda place, ours: as_other("ln", "-s", ours, place),
    ],
    ids=["a directory", "a link"],
)
def test_what_another_user_puts_there_after_the_check_is_not_used(
    open_disk: Path, plant: Callable[[Path, Path], None]
) -> None:
    shared, ours = made(open_disk / "shared", mode=0o1777), made(open_disk / "ours")
    paths = BundlePaths()
    path = paths.checked(str(shared / "bundle"))

    plant(shared / "bundle", ours)

    with pytest.raises(InvalidBundlePath):
        paths.make(path)
    assert os.listdir(ours) == []
    assert os.listdir(shared / "bundle") == []


def test_below_a_root_of_bundles_the_same_holds(open_disk: Path) -> None:
    roots = made(open_disk / "roots", mode=0o1777)
    as_other("mkdir", roots / "theirs")
    store = Store.open(str(open_disk / "work"), OverlayMounts(), bundle_roots=[str(roots)])

    assert f"{roots}/theirs belongs to user {OTHER}" in refused(store, roots / "theirs/bundle")

    store.close()


def test_a_bundle_whose_parent_changes_hands_can_be_released(store: Store, open_disk: Path) -> None:
    parent = made(open_disk / "parent")
    with store.reserve_bundle(str(parent / "bundle")) as bundle:
        stored = pulled(store, image(layer(file("a"))), "docker.io/library/shop:latest")
        mount_layers(stored.layers, bundle.overlay_directory, bundle.rootfs)
        bundle.commit(stored)
    os.chown(parent, OTHER, OTHER)

    store.release_bundle(str(parent / "bundle"))

    assert os.listdir(parent) == []
