"""meta_store.json: image-rs's file, to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.errors import InvalidManifest
from guestpull_server.models import Digest, ImageConfig
from guestpull_server.store import Store
from guestpull_server.store.entries import Unreadable
from guestpull_server.store.meta_store import MetaStore
from support.images import Image, Json, file, image, layer
from support.stores import AMD64, open_store, pulled, put_layer

BASE, TOP = layer(file("a")), layer(file("b"))
SHOP = image(BASE, TOP, process={"Cmd": ["/bin/sh"]}, config={"x-vendor": {"exact": 1.0, "null": None}})


def written(work_dir: Path) -> Any:
    return json.loads((work_dir / "meta_store.json").read_bytes())


def layer_entry(one: Any, store_path: str) -> dict[str, Json]:
    return {
        "decoder": "Gzip",
        "encrypted": False,
        "compressed_digest": one.digest,
        "uncompressed_digest": one.diff_id,
        "store_path": store_path,
    }


def image_rs_store(work_dir: Path, of: Image, names: list[str]) -> dict[str, Any]:
    """What image-rs leaves in a work directory; `names` are those of the layers' directories."""
    metas = []
    for one, name in zip(of.layers, names, strict=True):
        (work_dir / "layers" / name).mkdir(parents=True)
        metas.append(layer_entry(one, str(work_dir / "layers" / name)))
    meta_store = {
        "image_db": {
            of.image_id: {
                "id": of.image_id,
                "digest": of.digest,
                "reference": "docker.io/library/shop:latest",
                "image_config": json.loads(of.config),
                "signed": False,
                "layer_metas": metas,
            }
        },
        "layer_db": {meta["compressed_digest"]: meta for meta in metas},
        "snapshot_db": {"overlay": 3},
    }
    (work_dir / "meta_store.json").write_text(json.dumps(meta_store))
    return meta_store


def test_a_pulled_image_is_written_as_image_rs_reads_it(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, "docker.io/library/shop:latest")

    meta_store = written(work_dir)

    assert list(meta_store) == ["image_db", "layer_db", "snapshot_db"]
    assert meta_store["snapshot_db"] == {}
    paths = [str(work_dir / "layers" / one.digest.replace(":", "_")) for one in SHOP.layers]
    metas = [layer_entry(one, path) for one, path in zip(SHOP.layers, paths, strict=True)]
    assert meta_store["layer_db"] == {meta["compressed_digest"]: meta for meta in metas}
    assert meta_store["image_db"] == {
        SHOP.image_id: {
            "id": SHOP.image_id,
            "digest": SHOP.digest,
            "reference": "docker.io/library/shop:latest",
            "image_config": json.loads(SHOP.config),
            "signed": False,
            "layer_metas": metas,
        }
    }


def test_the_image_config_is_written_to_the_letter(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, "docker.io/library/shop:latest")

    assert SHOP.config in (work_dir / "meta_store.json").read_bytes()


def test_only_an_image_with_several_names_has_references(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, "docker.io/library/shop:latest")
    assert "references" not in written(work_dir)["image_db"][SHOP.image_id]

    pulled(store, SHOP, "docker.io/library/shop:1.0")

    entry = written(work_dir)["image_db"][SHOP.image_id]
    assert entry["reference"] == "docker.io/library/shop:latest"
    assert entry["references"] == ["docker.io/library/shop:latest", "docker.io/library/shop:1.0"]


def test_a_layer_that_occurs_twice_stands_once_at_its_topmost_place(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    doubled = image(BASE, TOP, BASE)
    pulled(store, doubled, "docker.io/library/doubled:latest")

    metas = written(work_dir)["image_db"][doubled.image_id]["layer_metas"]

    assert [meta["compressed_digest"] for meta in metas] == [TOP.digest, BASE.digest]
    known = reopened().find_image(doubled.image_id, None)
    assert [one.compressed_digest for one in known.layers] == [BASE.digest, TOP.digest, BASE.digest]


@pytest.mark.parametrize("generation", ["digest", "index"])
def test_a_store_that_image_rs_wrote_is_believed(work_dir: Path, generation: str) -> None:
    names = ["0", "1"] if generation == "index" else [one.digest.replace(":", "_") for one in SHOP.layers]
    image_rs_store(work_dir, SHOP, names)

    store = open_store(work_dir)

    found = store.image_for("docker.io/library/shop:latest", AMD64)
    assert found is not None
    assert [Path(one.store_path).name for one in found.layers] == names
    assert all(store.layer(one.compressed_digest) == one for one in found.layers)
    assert not any(store.is_read_only(one) for one in found.layers)
    assert store.warnings == ()
    store.close()


def test_a_pull_into_a_store_of_image_rs_keeps_what_is_there(work_dir: Path) -> None:
    before = image_rs_store(work_dir, SHOP, ["0", "1"])
    store = open_store(work_dir)
    other = image(BASE, layer(file("c")))

    pulled(store, other, "docker.io/library/other:latest")

    store.close()
    after = written(work_dir)
    assert after["snapshot_db"] == before["snapshot_db"]
    assert after["image_db"][SHOP.image_id] == before["image_db"][SHOP.image_id]
    assert after["layer_db"][BASE.digest] == before["layer_db"][BASE.digest]
    shared = after["image_db"][other.image_id]["layer_metas"][0]
    assert shared["store_path"] == str(work_dir / "layers" / "0")


def test_a_layer_that_moves_is_put_right_in_all_images_that_have_it(work_dir: Path) -> None:
    meta_store = image_rs_store(work_dir, SHOP, ["0", "1"])
    image_entry = meta_store["image_db"][SHOP.image_id]
    image_entry["layer_metas"][0] = image_entry["layer_metas"][0] | {"x-meta": [1]}
    meta_store["layer_db"][BASE.digest] = meta_store["layer_db"][BASE.digest] | {"x-layer": 1.50}
    (work_dir / "meta_store.json").write_text(json.dumps(meta_store))
    (work_dir / "layers" / "0").rmdir()
    store = open_store(work_dir)
    assert store.layer(Digest(BASE.digest)) is None

    pulled(store, SHOP, "docker.io/library/shop:latest")

    after = written(work_dir)
    right = layer_entry(BASE, str(work_dir / "layers/2"))
    assert after["layer_db"][BASE.digest] == right | {"x-layer": 1.5}
    assert after["image_db"][SHOP.image_id]["layer_metas"][0] == right | {"x-meta": [1]}
    store.close()


def test_entries_that_cannot_be_used_are_kept_reported_and_not_believed(work_dir: Path) -> None:
    meta_store = image_rs_store(work_dir, SHOP, ["0", "1"])
    meta_store["layer_db"]["sha256:short"] = {"decoder": "Lzma"}
    meta_store["image_db"]["mine"] = {"id": "mine"}
    (work_dir / "meta_store.json").write_text(json.dumps(meta_store))
    store = open_store(work_dir)

    put_layer(store, layer(file("c")))

    assert len(store.layers()) == 3
    assert len(store.images()) == 1
    assert "sha256:short" in store.warnings[0]
    assert "'mine'" in store.warnings[1]
    store.close()
    assert written(work_dir)["layer_db"]["sha256:short"] == {"decoder": "Lzma"}
    assert written(work_dir)["image_db"]["mine"] == {"id": "mine"}


def test_an_image_whose_layers_are_not_those_of_its_config_is_not_believed(work_dir: Path) -> None:
    meta_store = image_rs_store(work_dir, SHOP, ["0", "1"])
    meta_store["image_db"][SHOP.image_id]["layer_metas"].reverse()
    meta_store["image_db"][SHOP.image_id]["layer_metas"].pop()
    (work_dir / "meta_store.json").write_text(json.dumps(meta_store))

    store = open_store(work_dir)

    assert store.images() == ()
    assert "not the layers of its image_config" in store.warnings[0]
    store.close()


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(b'"\xff"', id="no UTF-8"),
        pytest.param(b"1e999", id="a number that nobody can hold"),
        pytest.param(b"[" * 200 + b"]" * 200, id="nested without end"),
    ],
)
def test_a_config_that_would_spoil_the_file_is_refused(store: Store, work_dir: Path, hostile: bytes) -> None:
    pulled(store, SHOP, "docker.io/library/shop:latest")
    config = SHOP.config.rstrip().removesuffix(b"}") + b',"x": ' + hostile + b"}"

    with pytest.raises(InvalidManifest):
        pulled(store, image(BASE, TOP, config=config), "docker.io/library/hostile:latest")

    assert list(written(work_dir)["image_db"]) == [SHOP.image_id]
    assert len(store.images()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"image_db": {}, "layer_db": []}', b'{"image_db":{},"layer_db":{"\xff":{}}}'],
)
def test_what_is_no_meta_store_is_unreadable(content: bytes) -> None:
    with pytest.raises(Unreadable):
        MetaStore.decode(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)
# hypothesis knows the words of our sources: keys that mean something are not among the unknown ones
KNOWN = {one.encode_name for one in msgspec.structs.fields(ImageConfig)} | {"references"}
UNKNOWN = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in KNOWN), JSON, max_size=4)
DATABASES = st.dictionaries(st.text(max_size=8), OBJECTS, max_size=4)


@given(st.builds(dict, image_db=DATABASES, layer_db=DATABASES, snapshot_db=OBJECTS), OBJECTS)
def test_every_key_of_every_level_survives(databases: dict[str, Any], unknown: dict[str, Any]) -> None:
    document = unknown | databases

    encoded = MetaStore.decode(json.dumps(document).encode()).encode()

    assert json.loads(encoded) == document
    assert MetaStore.decode(encoded).encode() == encoded


@given(UNKNOWN, UNKNOWN, UNKNOWN)
def test_unknown_keys_of_entries_survive_a_change(
    unknown_of_image: dict[str, Any], unknown_of_layer: dict[str, Any], config: dict[str, Any]
) -> None:
    meta = layer_entry(BASE, "/somewhere/layers/0")
    bare = image(BASE)
    entry = {
        "id": bare.image_id,
        "digest": bare.digest,
        "reference": "docker.io/library/bare:latest",
        "image_config": config | json.loads(bare.config),
        "signed": True,
        "layer_metas": [unknown_of_layer | meta],
    }
    before = {
        "image_db": {bare.image_id: unknown_of_image | entry},
        "layer_db": {BASE.digest: unknown_of_layer | meta},
        "snapshot_db": {},
    }
    catalog = MetaStore.decode(json.dumps(before).encode())
    catalog.put_layers(catalog.layers[Digest(BASE.digest)])

    catalog.rename_image(Digest(bare.image_id), ("one", "two"))

    renamed = {"reference": "one", "references": ["one", "two"]}
    after = json.loads(catalog.encode())
    assert after["layer_db"] == before["layer_db"]
    assert after["image_db"][bare.image_id] == unknown_of_image | entry | renamed


@given(st.permutations([BASE, TOP, layer(file("c"))]))
def test_the_same_content_gives_the_same_bytes_whatever_the_order(order: list[Any]) -> None:
    catalog, expected = MetaStore(), MetaStore()
    for one, wanted in zip(order, sorted(order, key=lambda one: one.digest), strict=True):
        for target, which in ((catalog, one), (expected, wanted)):
            meta = {"image_db": {}, "layer_db": {which.digest: layer_entry(which, "/a")}}
            target.put_layers(MetaStore.decode(json.dumps(meta).encode()).layers[Digest(which.digest)])

    assert catalog.encode() == expected.encode()
