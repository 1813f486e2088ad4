"""Images: their names, how they are found, and how they go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guestpull_server.errors import AmbiguousImage, ImageInUse, ImageNotPresent, ReadOnlyImage
from guestpull_server.models import Digest
from guestpull_server.platforms import Platform
from guestpull_server.store import Store, collect_garbage
from support.images import Image, file, image, layer, layer_of_tar
from support.stores import AMD64, MountsInMemory, bundled, is_whole, open_store, pulled, put_layer, resolved

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP, NEWER = image(BASE, TOP), image(BASE, SIDE)
LATEST, FIRST = "docker.io/library/shop:latest", "docker.io/library/shop:1.0"


def names_of(store: Store, of: Image) -> tuple[str, ...]:
    return store.find_image(of.image_id, None).references


def remove(store: Store, text: str, *, force: bool = False) -> tuple[list[str], list[str], set[str]]:
    """Remove an image, as the service does it: forgotten ids, forgotten names, deleted layers."""
    found = store.find_image(text, text)
    removal = store.remove_image(found, text if text in found.references else None, force)
    return list(removal.image_ids), list(removal.references), set(removal.deleted_layers)


def test_a_recorded_image_is_found_by_all_that_it_is_called(store: Store) -> None:
    stored = pulled(store, SHOP, LATEST)

    hexadecimal = SHOP.image_id.removeprefix("sha256:")
    for text in (
        SHOP.image_id,
        hexadecimal,
        hexadecimal[:12],
        f"sha256:{hexadecimal[:20]}",
        SHOP.digest,
        "shop",
    ):
        assert store.find_image(text, LATEST if text == "shop" else None) == stored
    assert store.image_by_manifest(Digest(SHOP.digest)) == stored
    assert store.image_for(LATEST, AMD64) == stored


@pytest.mark.parametrize("text", ["shop", "a" * 11, "", "sha256:", "f" * 12, "x" * 64, "sha256:" + "f" * 64])
def test_what_is_no_image_is_not_found(store: Store, text: str) -> None:
    pulled(store, SHOP, LATEST)

    with pytest.raises(ImageNotPresent):
        store.find_image(text, None)


def test_an_image_that_comes_in_another_form_lets_go_of_the_layers_that_nobody_uses(
    store: Store, tmp_path: Path, mounts: MountsInMemory
) -> None:
    forms = [image(layer_of_tar(BASE.tar, compression=one)) for one in ("gzip", "zstd", "none")]
    bundled(store, pulled(store, forms[0], LATEST), tmp_path / "bundle", mounts)

    for form in forms[1:]:
        pulled(store, form, LATEST)

    assert len({form.image_id for form in forms}) == 1
    kept = {one.layers[0].digest for one in (forms[0], forms[2])}
    assert {one.compressed_digest for one in store.layers()} == kept


def test_an_image_is_found_by_the_digests_of_other_forms_that_it_has_names_of(store: Store) -> None:
    forms = [image(layer_of_tar(BASE.tar, compression=one)) for one in ("gzip", "zstd", "none")]
    pinned = f"docker.io/library/shop@{forms[0].digest}"

    for form, name in zip(forms, (pinned, LATEST, LATEST), strict=True):
        pulled(store, form, name)

    found = store.find_image(forms[2].digest, None)
    assert (found.manifest_digest, found.references) == (forms[2].digest, (LATEST, pinned))
    assert store.image_by_manifest(Digest(forms[0].digest)) == found
    assert store.image_by_manifest(Digest(forms[1].digest)) is None


def test_a_shortened_id_that_fits_several_images_is_refused(store: Store, work_dir: Path) -> None:
    stored = pulled(store, SHOP, LATEST)
    store.close()
    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    twin = stored.image_id[:-1] + ("0" if stored.image_id[-1] != "0" else "1")
    meta["image_db"][twin] = meta["image_db"][SHOP.image_id] | {"id": twin}
    (work_dir / "meta_store.json").write_text(json.dumps(meta))
    store = open_store(work_dir)

    with pytest.raises(AmbiguousImage) as refused:
        store.find_image(SHOP.image_id.removeprefix("sha256:")[:12], None)

    assert refused.value.matches == 2
    assert store.find_image(twin, None).image_id == twin
    store.close()


def test_images_and_names_are_known_after_a_restart(store: Store, reopened: Callable[[], Store]) -> None:
    pulled(store, SHOP, LATEST)
    stored = pulled(store, SHOP, FIRST)

    assert reopened().images() == (stored,)


def test_an_image_is_for_its_own_platform(store: Store) -> None:
    arm = image(BASE, platform="linux/arm64/v8")
    pulled(store, SHOP, LATEST)
    stored = pulled(store, arm, LATEST)

    assert store.image_for(LATEST, Platform.parse("linux/arm64")) == stored
    assert store.image_for(LATEST, Platform.parse("linux/arm64/v8")) == stored
    assert store.image_for(LATEST, Platform.parse("linux/s390x")) is None
    assert names_of(store, SHOP) == names_of(store, arm) == (LATEST,)


@pytest.mark.parametrize(
    ("named", "wanted", "best"),
    [
        (["linux/386", "linux/amd64"], "linux/amd64", "linux/amd64"),
        (["linux/386", "linux/amd64"], "linux/386", "linux/386"),
        (["linux/386"], "linux/amd64", "linux/386"),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7", "linux/arm/v7"),
        (["linux/arm/v7", "linux/arm/v5", "linux/arm/v6"], "linux/arm/v6", "linux/arm/v6"),
        (["linux/arm/v7", "linux/arm/v5"], "linux/arm/v6", "linux/arm/v5"),
        (["linux/arm/v7"], "linux/arm/v6", "linux/arm/v7"),
        (["linux/arm/v7", "linux/arm64"], "linux/arm64/v8", "linux/arm64"),
    ],
)
def test_of_a_names_images_a_platform_gets_the_one_that_it_runs_best(
    store: Store, named: list[str], wanted: str, best: str
) -> None:
    stored = {platform: pulled(store, image(BASE, platform=platform), LATEST) for platform in named}

    assert store.image_for(LATEST, Platform.parse(wanted)) == stored[best]


def test_an_image_of_a_read_only_store_is_found_where_it_fits_better_than_ours(
    store: Store, work_dir: Path, tmp_path: Path, mounts: MountsInMemory
) -> None:
    other = open_store(tmp_path / "other")
    pulled(other, SHOP, LATEST)
    other.close()
    pulled(store, image(TOP, platform="linux/386"), LATEST)
    store.close()

    store = open_store(work_dir, mounts, additional_stores=[tmp_path / "other"])

    found = store.image_for(LATEST, AMD64)
    assert found is not None
    assert found.image_id == SHOP.image_id
    store.close()


def test_a_tag_moves_to_an_image_that_does_not_say_its_architecture(store: Store) -> None:
    silent = image(BASE, config={"architecture": ""})
    pulled(store, SHOP, LATEST)

    stored = pulled(store, silent, LATEST)

    assert store.image_for(LATEST, AMD64) == stored
    assert names_of(store, SHOP) == (f"docker.io/library/shop@{SHOP.digest}",)


def test_a_warm_pull_writes_nothing(store: Store, work_dir: Path) -> None:
    stored = pulled(store, SHOP, LATEST)
    before = os.stat(work_dir / "meta_store.json")

    assert pulled(store, SHOP, LATEST) == stored

    after = os.stat(work_dir / "meta_store.json")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_tag_moves_from_the_old_image_which_keeps_its_digest(store: Store) -> None:
    pulled(store, SHOP, LATEST)

    pulled(store, NEWER, LATEST)

    assert names_of(store, NEWER) == (LATEST,)
    assert names_of(store, SHOP) == (f"docker.io/library/shop@{SHOP.digest}",)


def test_a_tag_that_moves_leaves_the_other_names(store: Store) -> None:
    pulled(store, SHOP, LATEST)
    pulled(store, SHOP, FIRST)

    pulled(store, NEWER, LATEST)

    assert names_of(store, SHOP) == (FIRST,)


def test_a_tag_stands_before_a_digest(store: Store) -> None:
    by_digest = f"docker.io/library/shop@{SHOP.digest}"
    pulled(store, SHOP, by_digest)

    pulled(store, SHOP, LATEST)

    assert names_of(store, SHOP) == (LATEST, by_digest)


def test_an_image_whose_entry_was_lost_in_the_layer_database_keeps_its_layers_name(
    work_dir: Path, store: Store, reopened: Callable[[], Store]
) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    meta["layer_db"] = {}
    (work_dir / "meta_store.json").write_text(json.dumps(meta))

    store = reopened()

    assert {one.compressed_digest for one in store.layers()} == {BASE.digest, TOP.digest}


# -- removal ------------------------------------------------------------------------------------------------


def test_removing_one_of_several_names_forgets_the_name_only(store: Store) -> None:
    pulled(store, SHOP, LATEST)
    pulled(store, SHOP, FIRST)

    assert remove(store, LATEST) == ([], [LATEST], set())
    assert names_of(store, SHOP) == (FIRST,)


def test_removing_the_last_name_forgets_the_image_and_deletes_its_layers(
    store: Store, work_dir: Path
) -> None:
    pulled(store, SHOP, LATEST)

    assert remove(store, LATEST) == ([SHOP.image_id], [LATEST], {BASE.digest, TOP.digest})
    assert (store.images(), store.layers()) == ((), ())
    assert os.listdir(work_dir / "layers") == os.listdir(work_dir / "staging") == []


def test_names_that_are_digests_do_not_keep_an_image(store: Store) -> None:
    by_digest = f"docker.io/library/shop@{SHOP.digest}"
    pulled(store, SHOP, LATEST)
    pulled(store, SHOP, by_digest)

    assert remove(store, LATEST)[:2] == ([SHOP.image_id], [LATEST, by_digest])


def test_removing_by_id_forgets_all_names(store: Store) -> None:
    pulled(store, SHOP, LATEST)
    pulled(store, SHOP, FIRST)

    assert remove(store, SHOP.image_id)[:2] == ([SHOP.image_id], [LATEST, FIRST])


def test_a_layer_stays_while_another_image_has_it(store: Store) -> None:
    pulled(store, SHOP, LATEST)
    pulled(store, NEWER, FIRST)

    assert remove(store, LATEST)[2] == {TOP.digest}
    assert remove(store, FIRST)[2] == {BASE.digest, SIDE.digest}


def test_what_is_freed_is_told(store: Store, work_dir: Path) -> None:
    stored = pulled(store, image(BASE), LATEST)
    (metadata,) = (work_dir / "records").iterdir()
    size = 2 * len(BASE.tar) + metadata.stat().st_size

    assert store.remove_image(stored, None, force=False).freed_bytes == size


def test_an_image_that_a_bundle_uses_is_not_removed(
    store: Store, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)
    store = reopened()

    with pytest.raises(ImageInUse) as refused:
        remove(store, LATEST)

    assert refused.value.bundles == (str(tmp_path / "bundle"),)
    assert len(store.images()) == 1


def test_a_name_of_an_image_that_a_bundle_uses_can_be_removed(
    store: Store, mounts: MountsInMemory, tmp_path: Path
) -> None:
    pulled(store, SHOP, FIRST)
    bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)

    assert remove(store, LATEST) == ([], [LATEST], set())


def test_by_force_an_image_goes_at_once_and_its_layers_with_the_last_bundle(
    store: Store, mounts: MountsInMemory, tmp_path: Path, reopened: Callable[[], Store]
) -> None:
    stored = pulled(store, SHOP, LATEST)
    bundled(store, stored, tmp_path / "one", mounts)
    bundled(store, stored, tmp_path / "two", mounts)

    assert remove(store, LATEST, force=True) == ([SHOP.image_id], [LATEST], set())

    store = reopened()
    assert store.images() == ()
    assert store.release_bundle(str(tmp_path / "one")).layers == ()
    assert set(store.release_bundle(str(tmp_path / "two")).layers) == {BASE.digest, TOP.digest}
    assert store.layers() == ()


def test_an_image_that_is_removed_while_its_bundle_is_made_stays(
    store: Store, mounts: MountsInMemory, tmp_path: Path
) -> None:
    with store.pin([Digest(one.digest) for one in SHOP.layers]):
        stored = pulled(store, SHOP, LATEST)
        with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
            remove(store, LATEST)
            bundle.commit(stored)

    assert store.images() == (stored,)
    with pytest.raises(ImageInUse):
        remove(store, LATEST)


def test_an_image_that_went_meanwhile_is_not_present(store: Store) -> None:
    stored = pulled(store, SHOP, LATEST)
    store.remove_image(stored, None, force=False)

    with pytest.raises(ImageNotPresent):
        store.remove_image(stored, None, force=False)


# -- who uses what ------------------------------------------------------------------------------------------


def test_usage_counts_images_and_bundles(store: Store, mounts: MountsInMemory, tmp_path: Path) -> None:
    stored = pulled(store, SHOP, LATEST)
    pulled(store, NEWER, FIRST)
    bundled(store, stored, tmp_path / "two", mounts)
    bundled(store, stored, tmp_path / "one", mounts)

    usage = store.usage()

    assert usage.bundles_of_image == {SHOP.image_id: (str(tmp_path / "one"), str(tmp_path / "two"))}
    assert usage.bundles_of_layer == {BASE.digest: 2, TOP.digest: 2}
    assert set(usage.images_of_layer[Digest(BASE.digest)]) == {SHOP.image_id, NEWER.image_id}
    assert usage.images_of_layer[Digest(SIDE.digest)] == (NEWER.image_id,)


# -- read-only stores ---------------------------------------------------------------------------------------


@pytest.fixture
def baked(tmp_path: Path) -> Path:
    """A store in which SHOP lies, that is only read."""
    store = open_store(tmp_path / "baked")
    pulled(store, SHOP, LATEST)
    store.close(tidy=True)
    return tmp_path / "baked"


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in [directory, *directory.rglob("*")]}


def test_images_and_layers_of_read_only_stores_are_there_and_nothing_is_written(
    work_dir: Path, baked: Path
) -> None:
    before = snapshot(baked)
    store = open_store(work_dir, additional_stores=[baked])

    stored = pulled(store, SHOP, LATEST)

    assert stored.read_only_store == str(baked)
    assert store.images() == (stored,)
    assert store.image_for(LATEST, AMD64) == store.image_by_manifest(Digest(SHOP.digest)) == stored
    assert store.find_image(SHOP.image_id[7:19], None) == stored
    assert all(store.is_read_only(one) and store.is_present(one) for one in store.layers())
    assert stored.layers[0].implied_directories == (b"usr", b"\xff\xfe")
    store.close()
    assert snapshot(baked) == before


def test_an_image_that_a_read_only_store_has_not_whole_is_recorded_here(
    work_dir: Path, baked: Path, mounts: MountsInMemory
) -> None:
    shutil.rmtree(baked / "layers" / Digest(TOP.digest).directory_name)
    store = open_store(work_dir, additional_stores=[baked])

    stored = pulled(store, SHOP, LATEST)

    assert stored.read_only_store == ""
    assert [store.is_read_only(one) for one in stored.layers] == [True, False]
    assert store.image_for(LATEST, AMD64) == stored
    store.close()
    assert collect_garbage(str(work_dir), mounts) == ()


def test_an_image_of_a_read_only_store_is_not_removed(work_dir: Path, baked: Path) -> None:
    store = open_store(work_dir, additional_stores=[baked])
    pulled(store, SHOP, LATEST)

    with pytest.raises(ReadOnlyImage):
        remove(store, LATEST)

    store.close()


def test_an_image_may_have_layers_of_several_stores(work_dir: Path, baked: Path) -> None:
    store = open_store(work_dir, additional_stores=[baked])

    stored = pulled(store, NEWER, LATEST)

    assert [store.is_read_only(one) for one in stored.layers] == [True, False]
    assert stored.layers[0].store_path.startswith(str(baked))
    remove(store, NEWER.image_id)
    assert is_whole(str(baked / "layers" / stored.layers[0].compressed_digest.directory_name), BASE)
    store.close()


def test_a_read_only_store_may_be_mounted_elsewhere_than_where_it_was_made(
    work_dir: Path, baked: Path, tmp_path: Path
) -> None:
    baked.rename(tmp_path / "elsewhere")
    store = open_store(work_dir, additional_stores=[tmp_path / "elsewhere"])

    found = store.layer(Digest(BASE.digest))

    assert found is not None
    assert is_whole(found.store_path, BASE)
    store.close()


def test_an_image_of_a_read_only_store_under_another_name_is_recorded_here(
    work_dir: Path, baked: Path
) -> None:
    store = open_store(work_dir, additional_stores=[baked])

    stored = pulled(store, SHOP, FIRST)

    assert (stored.references, stored.read_only_store) == ((FIRST,), "")
    assert os.listdir(work_dir / "layers") == []
    assert remove(store, FIRST) == ([SHOP.image_id], [FIRST], set())
    assert store.find_image(SHOP.image_id, None).read_only_store == str(baked)
    store.close()


def test_names_that_only_a_read_only_store_has_are_listed_as_its_own(work_dir: Path, baked: Path) -> None:
    store = open_store(work_dir, additional_stores=[baked, baked])
    pulled(store, SHOP, FIRST)

    listed = [(one.image_id, one.references, one.read_only_store) for one in store.images()]

    assert listed == [(SHOP.image_id, (FIRST,), ""), (SHOP.image_id, (LATEST,), str(baked))]
    store.close()


# -- baking -------------------------------------------------------------------------------------------------


def baked_bytes(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(directory)): (
            path.stat().st_mtime_ns if "layers/" not in str(path) else 0,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in [directory, *directory.rglob("*")]
    }


def test_baking_the_same_images_gives_the_same_bytes(tmp_path: Path) -> None:
    results = []
    for order in ([BASE, TOP, SIDE], [SIDE, TOP, BASE]):
        work_dir = tmp_path / "baked"
        store = open_store(work_dir, guest_work_dir="/run/image")
        with store.pin([Digest(one.digest) for one in order]):
            for one in order:
                put_layer(store, one, record=b"headers")
        for of, name in ((SHOP, LATEST), (NEWER, FIRST)):
            stored = [store.layer(Digest(one.digest)) for one in of.layers]
            store.record_image(resolved(of, name), [one for one in stored if one is not None])
        store.close(tidy=True)
        results.append(baked_bytes(work_dir))
        work_dir.rename(tmp_path / f"baked-{len(results)}")

    assert results[0] == results[1]
    assert not {"lock", "staging", "overlay"} & set(results[0])


def test_a_tidy_store_can_be_opened_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "baked")
    stored = pulled(store, SHOP, LATEST)
    store.close(tidy=True)

    again = open_store(tmp_path / "baked")

    assert again.images() == (stored,)
    again.close()
