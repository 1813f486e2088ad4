"""Whatever the files of a work directory hold, a start goes on, and nothing is believed that is none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.config import LayerNames
from guestpull_server.errors import InvalidStore
from guestpull_server.models import Digest
from guestpull_server.store import Fault, audit, collect_garbage
from guestpull_server.store.bundle_making import PREPARING, READY, read_bundle_file
from guestpull_server.store.entries import Unreadable
from guestpull_server.store.layer_metadata import OLD_FILE_NAME, read_metadata
from guestpull_server.store.meta_store import MetaStore
from support.images import file, image, layer
from support.stores import MountsInMemory, bundled, is_whole, lose_metadata, open_store, pulled, put_layer

BASE = layer(file("a"))
SHOP = image(BASE)
OTHER = layer(file("other"))
LATEST = "docker.io/library/shop:latest"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(BASE.digest) | st.just("/a/b"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image_db", "layer_db", "id", "layer_metas", "digest", "decoder", "store_path"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
CONTENTS = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())


@given(CONTENTS)
def test_a_meta_store_is_read_or_unreadable(content: bytes) -> None:
    with suppress(Unreadable):
        assert MetaStore.decode(content).encode()


@given(CONTENTS)
def test_metadata_is_read_or_damaged(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for name in ("layers/0", "records"):
            Path(directory, name).mkdir(parents=True)
        Path(directory, "records/0.json").write_bytes(content)

        found = read_metadata(directory)

    assert len(found.layers) + len(found.damaged) == 1


@given(st.lists(CONTENTS, max_size=4))
def test_metadata_of_an_old_store_is_read_as_far_as_it_goes(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, OLD_FILE_NAME).write_bytes(b"\n".join(lines))

        found = read_metadata(directory)

    assert found.has_old_file
    assert not found.layers  # no directory exists


@given(CONTENTS, st.sampled_from([READY, PREPARING]))
def test_a_bundles_file_is_read_or_none(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, name).write_bytes(content)

        found = read_bundle_file(directory, name)

    assert found is None or found.bundle_path.startswith("/")


def changed(meta_store: Any, place: list[str], value: object) -> Any:
    *parents, last = place
    target = meta_store
    for key in parents:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[last] = value
    return meta_store


PLACES = [
    ["image_db", SHOP.image_id],
    ["image_db", SHOP.image_id, "id"],
    ["image_db", SHOP.image_id, "digest"],
    ["image_db", SHOP.image_id, "reference"],
    ["image_db", SHOP.image_id, "references"],
    ["image_db", SHOP.image_id, "image_config"],
    ["image_db", SHOP.image_id, "layer_metas"],
    ["image_db", SHOP.image_id, "layer_metas", "0", "compressed_digest"],
    ["layer_db", BASE.digest],
    ["layer_db", BASE.digest, "decoder"],
    ["layer_db", BASE.digest, "uncompressed_digest"],
    ["layer_db", BASE.digest, "store_path"],
    ["layer_db", BASE.digest, "encrypted"],
]
VALUES: list[object] = [
    None,
    5,
    [],
    {},
    "",
    "x",
    "relative/path",
    "/nul\0",
    "sha256:" + "A" * 64,
    "../../etc",
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: "/".join(one[:14] for one in place))
def test_one_bad_value_costs_one_entry_at_most(tmp_path: Path, place: list[str]) -> None:
    store = open_store(tmp_path / "work")
    pulled(store, SHOP, LATEST)
    store.close()
    path = tmp_path / "work/meta_store.json"
    good = path.read_bytes()
    for value in VALUES:
        path.write_text(json.dumps(changed(json.loads(good), place, value)))

        audit(str(tmp_path / "work"))
        store = open_store(tmp_path / "work")

        assert not store.damaged
        pulled(store, SHOP, LATEST)
        assert [one.image_id for one in store.images()] == [SHOP.image_id]
        found = store.layer(store.images()[0].layers[0].compressed_digest)
        assert found is not None
        assert found.uncompressed_digest == BASE.diff_id
        store.close()
        path.write_bytes(good)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A work directory with SHOP, in which a link to another directory stands for the layer BASE."""
    store = open_store(tmp_path / "work")
    stored = pulled(store, SHOP, LATEST)
    store.close()
    (tmp_path / "host").mkdir()
    (tmp_path / "host/shadow").touch()
    shutil.rmtree(stored.layers[0].store_path)
    Path(stored.layers[0].store_path).symlink_to(tmp_path / "host")
    return tmp_path / "work"


def test_a_link_in_a_layers_place_is_no_layer_and_is_replaced(linked: Path, tmp_path: Path) -> None:
    store = open_store(linked)

    assert store.layer(Digest(BASE.digest)) is None
    assert [store.is_present(one) for one in store.layers()] == [False]
    stored = pulled(store, SHOP, LATEST)
    assert is_whole(stored.layers[0].store_path, BASE)
    store.close()
    assert (tmp_path / "host/shadow").exists()


def test_a_link_in_a_layers_place_is_found(linked: Path) -> None:
    (finding,) = audit(str(linked))

    assert (finding.fault, finding.layer) == (Fault.MISSING, BASE.digest)
    assert "is not a directory" in finding.sentence


def test_a_link_in_a_layers_place_is_not_followed_into_a_read_only_store(
    linked: Path, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "reader", additional_stores=[linked])

    assert store.layer(Digest(BASE.digest)) is None
    store.close()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A work directory in which the layer OTHER, which no image has, is said to be where SHOP's layer is."""
    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    pulled(store, SHOP, LATEST)
    put_layer(store, OTHER)
    store.close()
    path = tmp_path / "work/meta_store.json"
    meta = json.loads(path.read_bytes())
    meta["layer_db"][OTHER.digest]["store_path"] = meta["layer_db"][BASE.digest]["store_path"]
    path.write_text(json.dumps(meta))
    return tmp_path / "work"


METADATA_LEFT = pytest.mark.parametrize("left", ["all", "of the other", "none"])


def leave_metadata(work_dir: Path, left: str) -> None:
    """Keep the metadata of all layers, or of the layer that is where it should be, or none."""
    for path in (work_dir / "records").glob("*.json"):
        if left == "none" or (left == "of the other" and BASE.digest not in path.read_text()):
            path.unlink()


@METADATA_LEFT
def test_two_entries_with_one_directory_are_found(shared: Path, left: str) -> None:
    leave_metadata(shared, left)

    found = [one for one in audit(str(shared)) if one.fault is Fault.CORRUPT]

    assert OTHER.digest in {one.layer for one in found} or "altered" in found[0].sentence
    assert left == "none" or BASE.digest not in {one.layer for one in found}


@METADATA_LEFT
def test_a_directory_that_two_entries_name_is_not_deleted_with_one_of_them(shared: Path, left: str) -> None:
    leave_metadata(shared, left)

    collect_garbage(str(shared), MountsInMemory())

    store = open_store(shared)
    (kept,) = store.layers()
    assert kept.compressed_digest == BASE.digest
    assert is_whole(kept.store_path, BASE)
    store.close()
    collect_garbage(str(shared), MountsInMemory())
    assert audit(str(shared)) == ()


def test_a_layer_whose_entry_names_anothers_directory_is_not_mounted(shared: Path) -> None:
    leave_metadata(shared, "of the other")

    store = open_store(shared)

    assert store.layer(Digest(OTHER.digest)) is None
    assert OTHER.digest in " ".join(store.warnings)
    store.close()


def test_a_directory_of_a_bundle_is_no_stray_although_nothing_else_knows_it(tmp_path: Path) -> None:
    mounts = MountsInMemory()
    store = open_store(tmp_path / "work", mounts)
    stored = pulled(store, SHOP, LATEST)
    bundled(store, stored, tmp_path / "bundle", mounts)
    store.close()
    lose_metadata(tmp_path / "work")
    (tmp_path / "work/meta_store.json").unlink()

    collect_garbage(str(tmp_path / "work"), mounts)

    assert is_whole(stored.layers[0].store_path, BASE)


HOSTILE_PLACES = [
    "/",
    "/etc",
    "/etc/passwd",
    "{work}",
    "{work}/layers",
    "{work}/layers/../overlay",
    "{work}/layers/{other}",
    "{work}/layers/{other}/layers/0",
    "{work}/layers/../staging/layers/0",
    "{work}/overlay/one/layers/0",
    "{work}/staging/0",
    "{link}/overlay/one/layers/0",
    "/somewhere/else/0",
    "/somewhere/layers/..",
]


@pytest.fixture(params=HOSTILE_PLACES)
def led_away(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A work directory with SHOP, whose layer BASE is said to be at a place that is none of a layer."""
    work_dir = tmp_path / "work"
    store = open_store(work_dir)
    pulled(store, SHOP, LATEST)
    put_layer(store, OTHER)
    store.close()
    (tmp_path / "link").symlink_to(work_dir)
    other = OTHER.digest.replace(":", "_")
    place = str(request.param).format(work=work_dir, link=tmp_path / "link", other=other)
    if place.startswith(str(tmp_path)):
        Path(place).mkdir(parents=True, exist_ok=True)
    path = work_dir / "meta_store.json"
    meta = changed(json.loads(path.read_bytes()), ["layer_db", BASE.digest, "store_path"], place)
    meta = changed(meta, ["image_db", SHOP.image_id, "layer_metas", "0", "store_path"], place)
    path.write_text(json.dumps(meta))
    return work_dir


def test_a_layer_of_ours_that_is_said_to_be_elsewhere_is_reported_and_put_right(led_away: Path) -> None:
    findings = [one for one in audit(str(led_away)) if BASE.digest in one.sentence]
    assert {one.fault for one in findings} == {Fault.CORRUPT}
    assert all("verify --repair" in one.remedy for one in findings)

    store = open_store(led_away)

    assert BASE.digest in " ".join(store.warnings)
    found = store.layer(Digest(BASE.digest))
    assert found is not None
    assert is_whole(found.store_path, BASE)
    assert store.find_image(LATEST, LATEST).layers == (found,)
    store.close()
    assert Fault.CORRUPT not in {finding.fault for finding in audit(str(led_away))}


def test_a_place_that_is_no_layers_is_never_mounted_without_metadata_either(led_away: Path) -> None:
    lose_metadata(led_away)
    assert Fault.CORRUPT in {finding.fault for finding in audit(str(led_away))}

    store = open_store(led_away)

    assert store.layer(Digest(BASE.digest)) is None
    stored = pulled(store, SHOP, LATEST)
    assert is_whole(stored.layers[0].store_path, BASE)
    store.close()
    assert Fault.CORRUPT not in {finding.fault for finding in audit(str(led_away))}


def test_a_read_only_store_leads_to_no_such_place(led_away: Path, tmp_path: Path) -> None:
    lose_metadata(led_away)

    store = open_store(tmp_path / "reader", additional_stores=[led_away])

    assert store.layer(Digest(BASE.digest)) is None
    store.close()


def test_a_read_only_store_leads_to_no_layer_of_the_work_directory(tmp_path: Path) -> None:
    own = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    put_layer(own, OTHER)
    own.close()
    other = open_store(
        tmp_path / "other", guest_work_dir=str(tmp_path / "work"), layer_names=LayerNames.INDEX
    )
    pulled(other, SHOP, LATEST)
    other.close()
    (tmp_path / "other/layers/0").rename(tmp_path / "lost")

    own = open_store(tmp_path / "work", additional_stores=[tmp_path / "other"])

    assert own.layer(Digest(BASE.digest)) is None
    assert Digest(BASE.digest) not in [one.compressed_digest for one in own.layers()]
    own.close()


def make(kind: str, place: Path) -> None:
    """Put something at a place that is no file."""
    match kind:
        case "directory":
            (place / "inner").mkdir(parents=True)
        case "fifo":
            os.mkfifo(place)
        case "link to nowhere":
            place.symlink_to("nowhere")
        case "link to itself":
            place.symlink_to(place.name)


KINDS = pytest.mark.parametrize("kind", ["directory", "fifo", "link to nowhere", "link to itself"])


@KINDS
@pytest.mark.parametrize("name", ["meta_store.json", "layer_facts.jsonl"])
def test_what_is_no_file_in_a_files_place_is_found_and_set_aside(
    tmp_path: Path, name: str, kind: str
) -> None:
    store = open_store(tmp_path / "work")
    pulled(store, SHOP, LATEST)
    store.close()
    (tmp_path / "work" / name).unlink(missing_ok=True)
    make(kind, tmp_path / "work" / name)
    (finding,) = [one for one in audit(str(tmp_path / "work")) if one.fault is Fault.CORRUPT]
    assert Path(finding.path).name == name

    store = open_store(tmp_path / "work")

    assert store.damaged == (name == "meta_store.json")
    (aside,) = (tmp_path / "work").glob(f"{name}.corrupt-*")
    assert str(aside) in store.warnings[0]
    assert [one.image_id for one in store.images()] == [SHOP.image_id]
    put_layer(store, OTHER)
    store.close()
    assert [one.fault for one in audit(str(tmp_path / "work"))] == [Fault.NOTE]


@KINDS
def test_what_is_no_file_in_the_place_of_metadata_is_found_and_deleted(tmp_path: Path, kind: str) -> None:
    store = open_store(tmp_path / "work")
    pulled(store, SHOP, LATEST)
    store.close()
    (path,) = (tmp_path / "work/records").glob("*.json")
    path.unlink()
    make(kind, path)
    (finding,) = audit(str(tmp_path / "work"))
    assert (finding.fault, finding.path) == (Fault.CORRUPT, str(path))

    store = open_store(tmp_path / "work")

    assert str(path) in store.warnings[0]
    assert [one.image_id for one in store.images()] == [SHOP.image_id]
    store.close()
    assert audit(str(tmp_path / "work")) == ()


@KINDS
def test_what_is_no_file_in_an_images_copys_place_is_found(tmp_path: Path, kind: str) -> None:
    store = open_store(tmp_path / "work")
    pulled(store, SHOP, LATEST)
    store.close()
    (copy,) = (tmp_path / "work/images").iterdir()
    copy.unlink()
    make(kind, copy)

    assert [one.fault for one in audit(str(tmp_path / "work"))] == [Fault.CORRUPT]


@KINDS
def test_a_read_only_store_without_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "other").mkdir()
    make(kind, tmp_path / "other/meta_store.json")

    with pytest.raises(InvalidStore):
        open_store(tmp_path / "work", additional_stores=[tmp_path / "other"])


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"])
def test_a_read_only_store_that_cannot_be_read_is_told_by_name(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other/meta_store.json").write_bytes(content)

    with pytest.raises(InvalidStore) as refused:
        open_store(tmp_path / "work", additional_stores=[tmp_path / "other"])

    assert str(tmp_path / "other") in str(refused.value)
