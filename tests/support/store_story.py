"""A sequence of pulls, moving tags, removals and releases, and the invariants at each point of it.

tell_the_story(store, mounts, bundles)      # each step may have been done before
check_from_outside(work_dir)                # at any instant, by any program
check_store(store, work_dir, mounts)        # after every start
check_end(store, work_dir, bundles)         # at the end
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from guestpull_server.errors import BundleNotFound, ImageNotPresent
from guestpull_server.store import Store, audit
from support.images import Image, file, image, layer
from support.stores import AMD64, MountsInMemory, bundled, is_whole, pulled

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
LAYERS: Final = {one.digest: one for one in (BASE, TOP, SIDE)}
FIRST, SECOND = image(BASE, TOP), image(BASE, SIDE)
IMAGES: Final = {one.image_id: one for one in (FIRST, SECOND)}
LATEST, OTHER = "docker.io/library/shop:latest", "docker.io/library/shop:other"


def tell_the_story(store: Store, mounts: MountsInMemory, bundles: Path) -> None:
    """Run the sequence, which ends with one image; each step may have been done before."""
    path = str(bundles / "one")
    if not any(bundle.bundle_path == path for bundle in store.bundles()):
        bundled(store, pulled(store, FIRST, LATEST), path, mounts)
    pulled(store, SECOND, LATEST)
    pulled(store, SECOND, OTHER)
    remove(store, FIRST)
    remove(store, OTHER)
    release(store, path)


def remove(store: Store, what: Image | str) -> None:
    """Remove an image, or a name, if it exists."""
    with suppress(ImageNotPresent):
        if isinstance(what, str):
            store.remove_image(store.find_image(what, what), what, force=True)
        else:
            store.remove_image(store.find_image(what.image_id, None), None, force=True)


def release(store: Store, path: str) -> None:
    """Release a bundle, if it exists."""
    with suppress(BundleNotFound):
        store.release_bundle(path)


def check_from_outside(work_dir: Path) -> None:
    """Check what another program may see at any instant."""
    path = work_dir / "meta_store.json"
    if path.exists():
        meta_store = json.loads(path.read_bytes())
        for entry in meta_store["image_db"].values():
            assert {meta["compressed_digest"] for meta in entry["layer_metas"]} <= set(LAYERS)
        for digest, entry in meta_store["layer_db"].items():
            directory = Path(entry["store_path"])
            assert not directory.exists() or is_whole(str(directory), LAYERS[digest])


def check_store(store: Store, work_dir: Path, mounts: MountsInMemory) -> None:
    """Check what must hold after every start."""
    assert not store.damaged
    assert store.warnings == ()
    assert os.listdir(work_dir / "staging") == []
    for one in store.layers():
        assert store.layer(one.compressed_digest) == one
        assert is_whole(one.store_path, LAYERS[one.compressed_digest])
    for stored in store.images():
        assert [one.compressed_digest for one in stored.layers] == [
            one.digest for one in IMAGES[stored.image_id].layers
        ]
        assert stored.references
    assert len(os.listdir(work_dir / "overlay")) == len(store.bundles())
    assert mounts.places <= {bundle.rootfs for bundle in store.bundles()}


def check_end(store: Store, work_dir: Path, bundles: Path) -> None:
    """Check what must hold at the end, and close the store."""
    found = store.image_for(LATEST, AMD64)
    assert found is not None
    assert (found.image_id, found.references[0]) == (SECOND.image_id, LATEST)
    assert [one.image_id for one in store.images()] == [SECOND.image_id]
    assert {one.compressed_digest for one in store.layers()} == {BASE.digest, SIDE.digest}
    assert store.bundles() == ()
    assert list(bundles.iterdir()) == []
    store.close()
    assert audit(str(work_dir)) == ()
