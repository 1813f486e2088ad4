"""Bundles: where they may be, who has them, and that nothing of them stays behind."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.errors import (
    BundleBusy,
    BundleExists,
    BundleNotFound,
    InvalidBundlePath,
    LayerInUse,
    StorageFailed,
)
from guestpull_server.models import StoredImage
from guestpull_server.store import Store
from guestpull_server.store.bundle_paths import BundlePaths
from support.images import file, image, layer
from support.stores import MountsInMemory, bundled, open_store, pulled, write_config

SHOP = image(layer(file("a")))
LATEST = "docker.io/library/shop:latest"


@pytest.fixture
def shop(store: Store) -> StoredImage:
    return pulled(store, SHOP, LATEST)


def overlays(work_dir: Path) -> list[str]:
    return os.listdir(work_dir / "overlay")


def test_a_bundle_is_listed_and_known_after_a_restart(
    store: Store,
    shop: StoredImage,
    mounts: MountsInMemory,
    tmp_path: Path,
    reopened: Callable[[], Store],
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)

    (bundle,) = store.bundles()
    assert (bundle.bundle_path, bundle.image_id, bundle.reference) == (path, SHOP.image_id, LATEST)
    assert bundle.layers == (SHOP.layers[0].digest,)
    assert bundle.mounted
    assert reopened().bundles() == (bundle,)


def test_a_bundle_that_is_not_mounted_any_more_is_known_and_can_be_released(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)
    mounts.places.clear()

    store = reopened()

    assert [bundle.mounted for bundle in store.bundles()] == [False]
    store.release_bundle(path)
    assert store.bundles() == ()


def test_a_reservation_has_its_directories_and_says_so_before_anything_is_mounted(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    with store.reserve_bundle(f"{tmp_path}//new/./bundle/") as bundle:
        assert bundle.bundle_path == str(tmp_path / "new/bundle")
        assert bundle.rootfs == str(tmp_path / "new/bundle/rootfs")
        assert os.listdir(bundle.rootfs) == []
        assert os.path.dirname(bundle.overlay_directory) == str(work_dir / "overlay")
        assert os.listdir(bundle.overlay_directory) == ["bundle.json.preparing"]


def test_a_reservation_that_is_not_committed_leaves_nothing(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path
) -> None:
    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        mounts.places.add(bundle.rootfs)
        os.mkdir(os.path.join(bundle.overlay_directory, "upper"))
        write_config(bundle)

    assert not (tmp_path / "bundle").exists()
    assert overlays(work_dir) == os.listdir(work_dir / "staging") == []
    assert mounts.places == set()
    assert store.bundles() == ()


def test_what_was_in_the_directory_before_stays(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/theirs").write_bytes(b"x")

    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        write_config(bundle)

    assert os.listdir(tmp_path / "bundle") == ["theirs"]


def test_a_config_that_another_wrote_meanwhile_stays(store: Store, tmp_path: Path) -> None:
    theirs = tmp_path / "bundle/config.json"

    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        theirs.write_bytes(b"theirs")
        with pytest.raises(BundleExists):
            write_config(bundle)

    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize("written", [False, True])
def test_a_config_that_another_wrote_stays_when_an_interrupted_pull_is_undone(
    store: Store, tmp_path: Path, reopened: Callable[[], Store], written: bool
) -> None:
    bundle = store.reserve_bundle(str(tmp_path / "bundle"))
    theirs = tmp_path / "bundle/config.json"
    if written:
        write_config(bundle)
        theirs.unlink()
    theirs.write_bytes(b"theirs")

    reopened()

    assert theirs.read_bytes() == b"theirs"


def test_a_config_that_the_bundles_owner_wrote_anew_goes_with_the_bundle(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = Path(bundled(store, shop, tmp_path / "bundle", mounts))
    (path / "config.json").unlink()
    (path / "config.json").write_bytes(b"merged")

    store.release_bundle(str(path))

    assert not path.exists()


def test_directories_that_were_made_for_a_bundle_go_if_it_is_not_committed(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with store.reserve_bundle(str(tmp_path / "there/p/q/bundle")):
        assert (tmp_path / "there/p/q/bundle/rootfs").is_dir()

    assert os.listdir(tmp_path / "there") == []


def test_directories_that_were_made_for_an_interrupted_pull_go_at_the_next_start(
    store: Store, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    store.reserve_bundle(str(tmp_path / "p/q/bundle"))

    reopened()

    assert not (tmp_path / "p").exists()


def test_directories_that_were_made_for_a_bundle_stay_where_another_uses_them(
    store: Store, tmp_path: Path
) -> None:
    with store.reserve_bundle(str(tmp_path / "p/q/bundle")):
        (tmp_path / "p/theirs").mkdir()

    assert sorted(tmp_path.glob("p/**")) == [tmp_path / "p", tmp_path / "p/theirs"]


def test_nobody_else_reaches_into_a_bundle_that_we_made(store: Store, tmp_path: Path) -> None:
    """What is setuid in an image, or a device, is another user's way up (CVE-2021-41103)."""
    with store.reserve_bundle(str(tmp_path / "p/bundle")):
        assert stat.S_IMODE((tmp_path / "p/bundle").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o755


def test_a_directory_that_is_there_keeps_its_mode(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle").chmod(0o751)

    with store.reserve_bundle(str(tmp_path / "bundle")):
        assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o751


def test_a_reservation_that_a_crash_interrupted_is_undone_at_the_next_start(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    bundle = store.reserve_bundle(str(tmp_path / "bundle"))
    mounts.places.add(bundle.rootfs)
    write_config(bundle)

    store = reopened()

    assert mounts.places == set()
    assert not (tmp_path / "bundle").exists()
    assert overlays(work_dir) == []
    with store.reserve_bundle(str(tmp_path / "bundle")):
        pass


def test_a_start_deletes_what_a_crash_left_of_the_making_of_a_bundle_that_is_ready(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        preparing = Path(bundle.overlay_directory) / "bundle.json.preparing"
        before = preparing.read_bytes()
        mounts.places.add(bundle.rootfs)
        bundle.commit(shop)
    preparing.write_bytes(before)

    (ready,) = reopened().bundles()

    assert os.listdir(ready.overlay_directory) == ["bundle.json"]


def test_an_interrupted_bundle_is_undone_although_it_is_busy(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    bundle = store.reserve_bundle(str(tmp_path / "bundle"))
    mounts.places.add(bundle.rootfs)
    mounts.busy.add(bundle.rootfs)

    assert reopened().warnings == ()
    assert overlays(work_dir) == []


def test_a_start_goes_on_although_an_interrupted_bundle_cannot_be_undone(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    bundle = store.reserve_bundle(str(tmp_path / "bundle"))
    mounts.places.add(bundle.rootfs)
    mounts.stuck.add(bundle.rootfs)

    assert "cannot be undone yet" in reopened().warnings[0]

    mounts.stuck.clear()
    assert reopened().warnings == ()
    assert overlays(work_dir) == []


def test_strange_things_in_overlay_are_reported_and_left_alone(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    (work_dir / "overlay/12").mkdir()
    broken = work_dir / "overlay" / ("ab" * 8)
    broken.mkdir()
    (broken / "bundle.json").write_text('{"bundle_path": "/b", "made_directory": true, "image_id": "x"}')

    warnings = reopened().warnings

    assert len(warnings) == 2
    assert sorted(overlays(work_dir)) == ["12", "ab" * 8]


def test_an_overlay_directory_without_a_word_is_deleted(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    (work_dir / "overlay" / ("ab" * 8)).mkdir()

    reopened()

    assert overlays(work_dir) == []


@pytest.mark.parametrize("key", ["bundle_path", "real_path"])
def test_a_bundle_file_with_a_path_that_cannot_be_is_unreadable(
    store: Store,
    shop: StoredImage,
    mounts: MountsInMemory,
    work_dir: Path,
    tmp_path: Path,
    reopened: Callable[[], Store],
    key: str,
) -> None:
    bundled(store, shop, tmp_path / "bundle", mounts)
    (overlay,) = overlays(work_dir)
    ready = work_dir / "overlay" / overlay / "bundle.json"
    ready.write_text(json.dumps(json.loads(ready.read_bytes()) | {key: "/a\0b"}))
    preparing = work_dir / "overlay" / ("ab" * 8)
    preparing.mkdir()
    (preparing / "bundle.json.preparing").write_text(json.dumps({key: "/a\0b", "made_directory": True}))

    store = reopened()

    assert [warning for warning in store.warnings if "cannot be read" in warning]
    assert store.bundles() == ()
    assert overlays(work_dir) == [overlay]


def test_a_start_waits_for_no_fifo_in_the_place_of_a_bundle_file(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    overlay = work_dir / "overlay" / ("ab" * 8)
    overlay.mkdir()
    os.mkfifo(overlay / "bundle.json")

    assert reopened().bundles() == ()


# -- one bundle, one pull -----------------------------------------------------------------------------------


def test_a_second_pull_to_the_same_bundle_is_refused(store: Store, tmp_path: Path) -> None:
    with (
        store.reserve_bundle(str(tmp_path / "bundle")),
        pytest.raises(BundleExists, match="another pull is making it"),
    ):
        store.reserve_bundle(f"{tmp_path}/bundle/")


@pytest.fixture
def alias(tmp_path: Path) -> Path:
    """A link, and what it leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to("real")
    return tmp_path / "alias"


def test_a_second_pull_by_another_name_of_the_same_directory_is_refused(
    store: Store, tmp_path: Path, alias: Path
) -> None:
    with (
        store.reserve_bundle(str(tmp_path / "real/bundle")) as bundle,
        pytest.raises(BundleExists, match="another pull is making it"),
    ):
        store.reserve_bundle(f"{alias}/bundle")

    assert bundle.bundle_path == str(tmp_path / "real/bundle")


def test_a_bundle_behind_a_link_is_mounted_and_keeps_the_name_that_it_was_given(
    store: Store,
    shop: StoredImage,
    mounts: MountsInMemory,
    alias: Path,
    tmp_path: Path,
    reopened: Callable[[], Store],
) -> None:
    with store.reserve_bundle(f"{alias}/bundle") as bundle:
        assert bundle.rootfs == f"{alias}/bundle/rootfs"
        mounts.places.add(str(tmp_path / "real/bundle/rootfs"))
        bundle.commit(shop)

    for opened in (store, reopened()):
        assert [(one.bundle_path, one.mounted) for one in opened.bundles()] == [(f"{alias}/bundle", True)]
        with pytest.raises(LayerInUse):
            opened.discard_layer(shop.layers[0].compressed_digest)


@pytest.mark.parametrize("name", ["alias/bundle", "real/bundle"])
def test_a_bundle_is_released_by_any_name_of_its_directory(
    store: Store, shop: StoredImage, mounts: MountsInMemory, alias: Path, tmp_path: Path, name: str
) -> None:
    bundled(store, shop, alias / "bundle", mounts)

    store.release_bundle(str(tmp_path / name))

    assert store.bundles() == ()
    assert os.listdir(tmp_path / "real") == []


def test_a_link_that_leads_elsewhere_by_now_leads_release_to_nothing_there(
    store: Store, shop: StoredImage, mounts: MountsInMemory, alias: Path, tmp_path: Path
) -> None:
    path = bundled(store, shop, alias / "bundle", mounts)
    (tmp_path / "elsewhere/bundle/rootfs").mkdir(parents=True)
    (tmp_path / "elsewhere/bundle/config.json").write_bytes(b"theirs")
    alias.unlink()
    alias.symlink_to("elsewhere")

    store.release_bundle(path)

    assert sorted(os.listdir(tmp_path / "elsewhere/bundle")) == ["config.json", "rootfs"]
    assert os.listdir(tmp_path / "real") == []


def test_a_bundle_is_not_made_twice(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)

    with pytest.raises(BundleExists):
        store.reserve_bundle(path)

    assert os.listdir(path) == ["config.json", "rootfs"] or os.listdir(path) == ["rootfs", "config.json"]


@pytest.mark.parametrize("theirs", ["config.json", "rootfs/etc", "rootfs -> /", "rootfs as a file"])
def test_a_directory_in_use_is_refused_and_left_as_it_is(
    store: Store, work_dir: Path, tmp_path: Path, theirs: str
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    match theirs:
        case "config.json":
            (bundle / "config.json").write_bytes(b"theirs")
        case "rootfs/etc":
            (bundle / "rootfs/etc").mkdir(parents=True)
        case "rootfs -> /":
            (bundle / "rootfs").symlink_to("/")
        case _:
            (bundle / "rootfs").write_bytes(b"theirs")
    before = sorted(str(path) for path in bundle.rglob("*"))

    with pytest.raises(BundleExists):
        store.reserve_bundle(str(bundle))

    assert sorted(str(path) for path in bundle.rglob("*")) == before
    assert overlays(work_dir) == []


def test_an_empty_rootfs_is_no_obstacle(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bundle/rootfs").mkdir(parents=True)

    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        assert os.path.isdir(bundle.rootfs)


# -- release ------------------------------------------------------------------------------------------------


def test_release_leaves_nothing(
    store: Store, shop: StoredImage, work_dir: Path, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)

    assert store.release_bundle(f"{path}/").layers == ()

    assert mounts.places == set()
    assert not os.path.exists(path)
    assert overlays(work_dir) == os.listdir(work_dir / "staging") == []
    assert len(store.images()) == 1


@pytest.mark.parametrize("path", ["", "relative", "/", "/nowhere", "/a\0b", "/a" * 450_000])
def test_what_is_no_bundle_is_not_released(store: Store, path: str) -> None:
    with pytest.raises(BundleNotFound):
        store.release_bundle(path)


def test_a_busy_bundle_stays_a_bundle(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)
    mounts.busy.add(f"{path}/rootfs")

    with pytest.raises(BundleBusy):
        store.release_bundle(path)

    assert [bundle.mounted for bundle in store.bundles()] == [True]
    assert os.path.exists(f"{path}/config.json")
    mounts.busy.clear()
    store.release_bundle(path)


def test_a_bundle_whose_directory_its_owner_deleted_is_released(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path, work_dir: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)
    os.unlink(f"{path}/config.json")
    os.rmdir(f"{path}/rootfs")
    os.rmdir(path)

    store.release_bundle(path)

    assert overlays(work_dir) == []


def test_of_two_releases_at_once_one_finds_no_bundle(work_dir: Path, tmp_path: Path) -> None:
    class SlowMounts(MountsInMemory):
        def __init__(self) -> None:
            super().__init__()
            self.unmounting = threading.Event()
            self.go_on = threading.Event()

        def unmount(self, rootfs: str | None, _overlay_directory: str) -> tuple[str, ...]:
            self.unmounting.set()
            self.go_on.wait()
            return super().unmount(rootfs, _overlay_directory)

    mounts = SlowMounts()
    store = open_store(work_dir, mounts)
    path = bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)
    outcomes: list[str] = []

    def release() -> None:
        try:
            store.release_bundle(path)
            outcomes.append("released")
        except BundleNotFound:
            outcomes.append("not found")

    threads = [threading.Thread(target=release) for _ in range(2)]
    for thread in threads:
        thread.start()
    mounts.unmounting.wait()
    assert len(store.bundles()) == 1  # others are not kept waiting
    mounts.go_on.set()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == ["not found", "released"]
    store.close()


def test_releasing_fails_by_name_where_the_system_refuses(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)
    os.unlink(f"{path}/config.json")
    os.mkdir(f"{path}/config.json")

    with pytest.raises(StorageFailed):
        store.release_bundle(path)

    assert len(store.bundles()) == 1
    os.rmdir(f"{path}/config.json")
    store.release_bundle(path)


# -- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["", "bundle", "./bundle", "/", "//", "/a/../b", "/..", "/a\0b", "/" + "/a" * 2500, "/" + "a" * 256],
)
def test_paths_that_no_bundle_can_have_are_refused(store: Store, path: str, work_dir: Path) -> None:
    with pytest.raises(InvalidBundlePath):
        store.reserve_bundle(path)
    assert overlays(work_dir) == []


def test_a_file_in_the_way_is_refused(store: Store, tmp_path: Path, work_dir: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")

    for path in (tmp_path / "file", tmp_path / "file/bundle"):
        with pytest.raises(InvalidBundlePath):
            store.reserve_bundle(str(path))

    assert (tmp_path / "file").read_bytes() == b"x"
    assert overlays(work_dir) == []


@given(st.text(alphabet="/.a", max_size=12).map(lambda text: f"/{text}"))
def test_a_checked_path_is_normal_and_below_a_root(path: str) -> None:
    paths = BundlePaths(["/a", "/a.a/"])
    try:
        checked = paths.checked(path).requested
    except InvalidBundlePath:
        return
    assert checked == os.path.normpath(checked)
    assert checked.startswith(("/a/", "/a.a/"))
    assert ".." not in checked.split("/")


@pytest.fixture
def rooted(work_dir: Path, tmp_path: Path, mounts: MountsInMemory, store: Store) -> Store:
    """A store whose bundles must be below tmp_path/bundles."""
    store.close()
    (tmp_path / "bundles").mkdir()
    return open_store(work_dir, mounts, bundle_roots=[tmp_path / "bundles"])


@pytest.mark.parametrize("path", ["elsewhere", "bundles", "bundles-too/x", "bundles/../elsewhere"])
def test_bundles_stay_below_their_roots(rooted: Store, tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidBundlePath):
        rooted.reserve_bundle(f"{tmp_path}/{path}")
    rooted.close()


def test_no_link_leads_out_of_the_roots(rooted: Store, tmp_path: Path, work_dir: Path) -> None:
    (tmp_path / "outside/bundle").mkdir(parents=True)
    (tmp_path / "bundles/link").symlink_to(tmp_path / "outside")

    for path in ("bundles/link", "bundles/link/bundle", "bundles/link/new"):
        with pytest.raises(InvalidBundlePath):
            rooted.reserve_bundle(f"{tmp_path}/{path}")

    assert sorted(str(path) for path in (tmp_path / "outside").rglob("*")) == [f"{tmp_path}/outside/bundle"]
    assert overlays(work_dir) == []
    rooted.close()


def test_a_bundle_that_became_a_link_leads_release_to_nothing_outside(
    rooted: Store, tmp_path: Path, mounts: MountsInMemory, work_dir: Path
) -> None:
    path = bundled(rooted, pulled(rooted, SHOP, LATEST), tmp_path / "bundles/one", mounts)
    (tmp_path / "bundles/one").rename(tmp_path / "bundles/moved")
    (tmp_path / "outside/rootfs").mkdir(parents=True)
    (tmp_path / "outside/config.json").write_bytes(b"theirs")
    (tmp_path / "bundles/one").symlink_to(tmp_path / "outside")

    rooted.release_bundle(path)

    assert sorted(os.listdir(tmp_path / "outside")) == ["config.json", "rootfs"]
    assert mounts.places == {f"{path}/rootfs"}
    rooted.close()


def test_what_is_done_in_a_bundle_is_done_in_the_directory_that_was_allowed(
    rooted: Store, tmp_path: Path
) -> None:
    (tmp_path / "bundles/sub").mkdir()
    (tmp_path / "outside/one/rootfs").mkdir(parents=True)
    with rooted.reserve_bundle(f"{tmp_path}/bundles/sub/one") as bundle:
        with bundle.opened() as directory:
            (tmp_path / "bundles/sub").rename(tmp_path / "bundles/moved")
            (tmp_path / "bundles/sub").symlink_to(tmp_path / "outside")
            os.close(os.open("config.json", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        assert (tmp_path / "bundles/moved/one/config.json").exists()

        with pytest.raises(InvalidBundlePath), bundle.opened():
            pass

    assert sorted(str(path) for path in (tmp_path / "outside/one").iterdir()) == [
        f"{tmp_path}/outside/one/rootfs"
    ]
    rooted.close()


def test_a_busy_bundle_is_named_by_its_path(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)
    mounts.busy.add(f"{path}/rootfs")

    with pytest.raises(BundleBusy) as caught:
        store.release_bundle(path)

    assert caught.value.bundle_path == path
    mounts.busy.clear()


@pytest.mark.parametrize(
    "place", ["layers", "layers/{layer}/usr", "overlay/one", "staging", "images", "records/x"]
)
def test_no_bundle_lies_in_what_is_the_store_s_own(
    store: Store, shop: StoredImage, work_dir: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "alias").symlink_to(work_dir)
    before = sorted(work_dir.rglob("*"))
    name = place.format(layer=os.path.basename(shop.layers[0].store_path))

    for path in (work_dir / name, tmp_path / "alias" / name):
        with pytest.raises(InvalidBundlePath, match="store's own"):
            store.reserve_bundle(str(path))

    assert sorted(work_dir.rglob("*")) == before


@pytest.mark.parametrize("place", ["", "config.json", "meta_store.json", "meta_store.json.new", "lock/x"])
def test_no_bundle_is_a_store_or_one_of_its_files(store: Store, work_dir: Path, place: str) -> None:
    before = sorted(work_dir.rglob("*"))

    with pytest.raises(InvalidBundlePath, match="store"):
        store.reserve_bundle(f"{work_dir}/{place}")

    assert sorted(work_dir.rglob("*")) == before


def test_no_bundle_is_another_store(work_dir: Path, tmp_path: Path) -> None:
    baked = open_store(tmp_path / "baked")
    pulled(baked, SHOP, LATEST)
    baked.close(tidy=True)
    store = open_store(work_dir, additional_stores=[tmp_path / "baked"])

    with pytest.raises(InvalidBundlePath, match="directory of a store"):
        store.reserve_bundle(str(tmp_path / "baked"))

    store.close()


def test_a_bundle_may_lie_beside_them(store: Store, work_dir: Path) -> None:
    with store.reserve_bundle(str(work_dir / "layers-too/bundle")):
        assert (work_dir / "layers-too/bundle/rootfs").is_dir()


def test_bundle_files_say_what_a_bundle_is(
    store: Store, shop: StoredImage, mounts: MountsInMemory, tmp_path: Path, work_dir: Path
) -> None:
    path = bundled(store, shop, tmp_path / "bundle", mounts)

    (overlay,) = overlays(work_dir)

    assert json.loads((work_dir / "overlay" / overlay / "bundle.json").read_bytes()) == {
        "bundle_path": path,
        "made_directory": True,
        "image_id": SHOP.image_id,
        "reference": LATEST,
        "layers": [SHOP.layers[0].digest],
        "real_path": path,
    }
