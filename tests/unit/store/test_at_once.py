"""Callers at once end as if they had come one after another."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from guestpull_server.errors import BundleExists, BundleNotFound, ImageInUse, ImageNotPresent
from guestpull_server.models import Digest
from guestpull_server.store import Store, audit
from support.images import file, image, layer
from support.stores import MountsInMemory, bundled, is_whole, open_store, pulled, put_layer

LAYERS = [layer(file(name)) for name in "abcdef"]
IMAGES = [image(*chosen) for chosen in (LAYERS[:3], LAYERS[1:4], LAYERS[2:5], LAYERS[3:])]


class Caller:
    """Does things at random, as one of several; what it is refused is what it may be refused."""

    def __init__(self, store: Store, mounts: MountsInMemory, bundles: Path, seed: str) -> None:
        self._store = store
        self._mounts = mounts
        self._bundles = bundles
        self._dice = random.Random(seed)  # reproducible on purpose

    def run(self) -> None:
        for _ in range(60):
            with suppress(BundleExists, BundleNotFound, ImageInUse, ImageNotPresent):
                self._dice.choice([self.pull, self.pull, self.remove, self.release, self.look])()

    def pull(self) -> None:
        number = self._dice.randrange(len(IMAGES))
        wanted = IMAGES[number]
        with (
            # in this order, as the puller does: a layer that is pinned in vain stays until gc comes
            self._store.reserve_bundle(self._bundle()) as bundle,
            self._store.pin([Digest(one.digest) for one in wanted.layers]),
        ):
            stored = pulled(self._store, wanted, f"docker.io/library/shop:{number % 2}")
            assert all(self._store.layer(one.compressed_digest) == one for one in stored.layers)
            self._mounts.places.add(bundle.rootfs)
            bundle.commit(stored)

    def remove(self) -> None:
        found = self._store.find_image(self._dice.choice(IMAGES).image_id, None)
        self._store.remove_image(found, None, force=self._dice.random() < 0.5)

    def release(self) -> None:
        self._store.release_bundle(self._bundle())

    def look(self) -> None:
        used = {digest for bundle in self._store.bundles() for digest in bundle.layers}
        assert used <= {one.digest for one in LAYERS}
        for listed in (self._store.usage, self._store.images, self._store.layers):
            listed()

    def _bundle(self) -> str:
        return str(self._bundles / f"{self._dice.randrange(6)}")


@pytest.mark.parametrize("seed", range(4))
def test_pulls_removals_and_releases_at_once_leave_a_store_that_is_true(tmp_path: Path, seed: int) -> None:
    work_dir, mounts = tmp_path / "work", MountsInMemory()
    store = open_store(work_dir, mounts)

    with ThreadPoolExecutor(6) as pool:
        callers = [Caller(store, mounts, tmp_path, f"{seed}/{number}") for number in range(6)]
        for done in [pool.submit(caller.run) for caller in callers]:
            done.result()

    contents = {one.digest: one for one in LAYERS}
    for digest in {digest for bundle in store.bundles() for digest in bundle.layers}:
        found = store.layer(digest)
        assert found is not None
        assert is_whole(found.store_path, contents[digest])
    for bundle in store.bundles():
        store.release_bundle(bundle.bundle_path)
    for stored in store.images():
        assert all(store.is_present(one) for one in stored.layers)
        store.remove_image(stored, None, force=False)
    assert (store.layers(), store.images(), store.bundles()) == ((), (), ())
    store.close()
    assert audit(str(work_dir)) == ()
    assert os.listdir(work_dir / "layers") == os.listdir(work_dir / "overlay") == []


def test_committing_one_layer_at_once_keeps_one_of_them(store: Store, work_dir: Path) -> None:
    together = threading.Barrier(8)

    def commit() -> str:
        together.wait()
        return put_layer(store, LAYERS[0]).store_path

    with ThreadPoolExecutor(8) as pool:
        paths = {done.result() for done in [pool.submit(commit) for _ in range(8)]}

    assert len(paths) == 1
    assert is_whole(paths.pop(), LAYERS[0])
    assert os.listdir(work_dir / "staging") == []


def test_of_pulls_to_one_bundle_at_once_one_succeeds(
    store: Store, mounts: MountsInMemory, tmp_path: Path
) -> None:
    stored = pulled(store, IMAGES[0], "docker.io/library/shop:latest")
    together = threading.Barrier(8)

    def make() -> str:
        together.wait()
        try:
            return bundled(store, stored, tmp_path / "bundle", mounts)
        except BundleExists:
            return ""

    with ThreadPoolExecutor(8) as pool:
        outcomes = [done.result() for done in [pool.submit(make) for _ in range(8)]]

    assert sorted(outcomes) == [""] * 7 + [str(tmp_path / "bundle")]
    assert len(store.bundles()) == 1


def test_a_layer_that_comes_back_while_it_is_deleted_is_remembered(
    store: Store, reopened: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = pulled(store, image(LAYERS[0]), "docker.io/library/shop:latest")
    unlink = os.unlink
    back: list[str] = []

    def slow_unlink(name: str, *, dir_fd: int | None = None) -> None:
        if name == "one" and not back:
            back.append("")
            back.append(put_layer(store, LAYERS[0]).store_path)
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patching:
        patching.setattr(os, "unlink", slow_unlink)
        store.remove_image(stored, None, force=False)

    found = reopened().layer(Digest(LAYERS[0].digest))
    assert found is not None
    assert found.size_bytes == 2 * len(LAYERS[0].tar)
    assert is_whole(back[1], LAYERS[0])
