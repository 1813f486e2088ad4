"""Stores of earlier versions, which have layer_facts.jsonl instead of a metadata file for each layer.

The bytes are written out as those versions wrote them: a line for each layer, and a line for each deletion.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guestpull_server.models import StoredLayer
from guestpull_server.store import Store, audit, collect_garbage
from support.images import Layer, file, image, layer
from support.stores import MountsInMemory, is_whole, lose_metadata, open_store, pulled, put_layer
from unit.store.test_crashes import die_at
from unit.store.test_durability import FullDisk, Recorder

BASE, TOP, GONE = layer(file("a")), layer(file("b")), layer(file("gone"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


def line(one: Layer) -> str:
    """What the commit of a layer appended."""
    return (
        f'{{"compressed_digest":"{one.digest}","uncompressed_digest":"{one.diff_id}","decoder":"Gzip",'
        f'"directory":"{one.digest.replace(":", "_")}","size_bytes":{2 * len(one.tar)},"entries":2,'
        '"implied_directories":["usr","\u00ff\u00fe"],"committed_at":1700000000}\n'
    )


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store with SHOP, from which a layer was deleted before."""
    work_dir = tmp_path / "old"
    store = open_store(work_dir)
    for one in (BASE, TOP):
        put_layer(store, one, record=b"headers")
    pulled(store, SHOP, LATEST)
    store.close()
    lose_metadata(work_dir)
    lines = (line(GONE), line(BASE), f'{{"gone":"{GONE.digest}"}}\n', line(TOP))
    (work_dir / "layer_facts.jsonl").write_text("".join(lines))
    return work_dir


def assert_upgraded(store: Store, work_dir: Path) -> None:
    assert [known(one) for one in store.layers()] == [
        (one.digest, 2 * len(one.tar), (b"usr", b"\xff\xfe")) for one in sorted_by_digest(BASE, TOP)
    ]
    assert store.warnings == ()
    assert not (work_dir / "layer_facts.jsonl").exists()
    assert sorted(os.listdir(work_dir / "records")) == sorted(
        f"{one.digest.replace(':', '_')}{end}" for one in (BASE, TOP) for end in (".json", ".record")
    )


def known(one: StoredLayer) -> tuple[str, int, tuple[bytes, ...]]:
    return one.compressed_digest, one.size_bytes, one.implied_directories


def sorted_by_digest(*layers: Layer) -> list[Layer]:
    return sorted(layers, key=lambda one: one.digest)


def test_a_start_replaces_the_old_file(old: Path) -> None:
    store = open_store(old)

    assert_upgraded(store, old)
    store.close()
    assert audit(str(old)) == ()


def test_the_times_of_commits_are_kept(old: Path) -> None:
    store = open_store(old)
    store.remove_image(store.find_image(LATEST, LATEST), None, force=False)
    put_layer(store, GONE)

    assert set(store.delete_unused_for(0).layers) == {GONE.digest}
    store.close()
    for path in (old / "records").glob("*.json"):
        assert json.loads(path.read_bytes())["committed_at"] == 1700000000


def test_a_layer_without_an_entry_is_restored_from_the_old_file(old: Path) -> None:
    (old / "meta_store.json").unlink()

    store = open_store(old)

    assert {one.compressed_digest for one in store.layers()} == {BASE.digest, TOP.digest}
    assert [one.image_id for one in store.images()] == [SHOP.image_id]
    store.close()


@pytest.mark.parametrize("torn", [b'{"compressed_digest":"sha', b"\xff\xfe\n", b'{"gone":5}\n[]\n{}\n'])
def test_a_damaged_line_damages_no_other(old: Path, torn: bytes) -> None:
    with (old / "layer_facts.jsonl").open("ab") as lines:
        lines.write(torn)

    store = open_store(old)

    assert_upgraded(store, old)
    store.close()


def test_a_read_only_store_is_read_and_not_changed(old: Path, tmp_path: Path) -> None:
    before = (old / "layer_facts.jsonl").read_bytes()

    store = open_store(tmp_path / "work", additional_stores=[old])

    assert [known(one)[1] for one in store.layers()] == [
        2 * len(one.tar) for one in sorted_by_digest(BASE, TOP)
    ]
    assert (old / "layer_facts.jsonl").read_bytes() == before
    assert list((old / "records").glob("*.json")) == []
    store.close()


def test_audit_and_a_dry_run_of_gc_read_the_old_file_and_find_nothing(old: Path) -> None:
    assert audit(str(old)) == ()
    assert collect_garbage(str(old), MountsInMemory(), dry_run=True) == ()
    assert (old / "layer_facts.jsonl").exists()


def test_the_metadata_is_durable_before_the_old_file_is_deleted(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorder(monkeypatch, old, volatile=False)
    unlink = os.unlink

    def unlinked(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        if os.path.basename(path) == "layer_facts.jsonl":
            disk.steps.append("unlink layer_facts.jsonl")

    monkeypatch.setattr(os, "unlink", unlinked)

    open_store(old).close()

    renames = sorted(f"rename records/{one.digest.replace(':', '_')}.json" for one in (BASE, TOP))
    assert sorted(disk.steps[:2]) == renames
    assert disk.steps[2:] == ["syncfs records", "unlink layer_facts.jsonl", "fsync ."]


@pytest.mark.parametrize("torn", [b"", b'{"compressed_digest":"sha'])
def test_what_a_power_cut_left_of_the_replacement_is_replaced_again(old: Path, torn: bytes) -> None:
    (path := old / "records" / f"{BASE.digest.replace(':', '_')}.json").write_bytes(torn)

    store = open_store(old)

    assert str(path) in store.warnings[0]
    assert all(one.size_bytes >= 0 for one in store.layers())
    store.close()
    assert audit(str(old)) == ()


def test_killed_at_any_system_call_of_the_replacement_nothing_is_lost(old: Path, tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        work_dir = tmp_path / f"{number}/work"
        shutil.copytree(old, work_dir)
        meta = (work_dir / "meta_store.json").read_text().replace(str(old), str(work_dir))
        (work_dir / "meta_store.json").write_text(meta)
        child = os.fork()
        if child == 0:
            try:
                die_at(number)
                open_store(work_dir).close()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert {found for found in audit(str(work_dir)) if found.layer is not None} == set()

        store = open_store(work_dir)

        assert_upgraded(store, work_dir)
        assert all(is_whole(one.store_path, BASE) or is_whole(one.store_path, TOP) for one in store.layers())
        store.close()
        if not os.WIFSIGNALED(status):
            break
    assert number > 8


def test_on_a_full_disk_the_old_file_stays_until_there_is_room(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, 1)
    store = open_store(old)
    assert disk.refused
    assert (old / "layer_facts.jsonl").exists()
    assert all(one.size_bytes >= 0 for one in store.layers())
    disk.full = False

    store.remove_image(store.find_image(LATEST, LATEST), None, force=False)

    assert store.layers() == ()
    assert not (old / "layer_facts.jsonl").exists()
    store.close()


def test_a_baked_store_keeps_no_times(old: Path, reproduced: Callable[[Path], dict[str, bytes]]) -> None:
    open_store(old).close(tidy=True)

    files = reproduced(old)

    assert all(b"committed_at" not in content for content in files.values())
    assert not any(name.startswith("layer_facts") for name in files)


@pytest.fixture
def reproduced() -> Callable[[Path], dict[str, bytes]]:
    """Read the metadata of a store."""

    def read(work_dir: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in work_dir.rglob("*.json*") if path.is_file()}

    return read
