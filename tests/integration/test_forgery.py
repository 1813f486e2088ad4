"""What somebody who can write to a store may do there: nothing of it is believed, and most of it is put right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from guestpull_client import PullPolicy
from guestpull_client.errors import DataLoss
from support.daemon import Daemon, Tmpfs
from support.images import Layer, directory, file, image, layer
from support.local_images import write_layout
from support.peers import run
from support.samples import changes, everything, runnable
from support.simulator import RegistrySimulator
from support.stores import lose_metadata

BASE: Final = runnable()
ALL: Final = everything()
TOP: Final = changes()
SHOP: Final = image(BASE, ALL, TOP, process={"Cmd": ["/bin/ls"]})
EVIL: Final = layer(directory("all"), file("all/evil", b"forged"))
PROVING: Final = {"verify_reuse": "always"}


def guestpulld(command: str, work_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "guestpull_server.cli", command, "--work-dir", str(work_dir)]
    return run(*program, *options, check=False)


def bake(work_dir: Path, source: str, reference: str = "") -> None:
    done = guestpulld("bake", work_dir, source, *(["--reference", reference] if reference else []))
    assert done.returncode == 0, done.stderr


def directory_of(store: Path, one: Layer) -> Path:
    return store / "layers" / one.digest.replace(":", "_")


def record_of(store: Path, one: Layer) -> Path:
    return store / "records" / f"{one.digest.replace(':', '_')}.record"


def contents(store: Path) -> dict[str, Any]:
    """All that a store is, its layers' files but for their contents."""
    found = {}
    for path in (store, *store.rglob("*")):
        status = path.lstat()
        is_plain = path.is_file() and not path.is_symlink()
        found[str(path)] = (
            status.st_mode,
            status.st_mtime_ns,
            status.st_size,
            path.read_bytes() if is_plain else b"",
        )
    return found


def compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))


def change_meta_store(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alter meta_store.json; an image config that is left alone stays as it was to the letter."""
    path = store / "meta_store.json"
    before = path.read_text()
    document = json.loads(before)
    config = json.loads(SHOP.config)
    change(document)
    after = compact(document)
    kept = document["image_db"].get(SHOP.image_id, {}).get("image_config") == config
    path.write_text(after.replace(compact(config), SHOP.config.decode().strip()) if kept else after)


def of_image(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def changed(store: Path) -> None:
        change_meta_store(store, lambda document: change(document["image_db"][SHOP.image_id]) and None)

    return changed


def forge_a_layer(store: Path) -> None:
    """A layer of the attacker's, with its own record, in the place of another; its diff_id wherever one stands."""
    write_layout(store.with_name("evil"), {"1": image(EVIL)})
    evil = store.with_name("evil-store")
    bake(evil, f"oci:{store.with_name('evil')}", "evil.example/evil:1")
    shutil.rmtree(directory_of(store, ALL))
    run("cp", "--archive", str(directory_of(evil, EVIL)), str(directory_of(store, ALL)))
    shutil.copy(record_of(evil, EVIL), record_of(store, ALL))

    def forge(document: dict[str, Any]) -> None:
        entry = document["image_db"][SHOP.image_id]
        for meta in (document["layer_db"][ALL.digest], *entry["layer_metas"]):
            if meta["compressed_digest"] == ALL.digest:
                meta["uncompressed_digest"] = EVIL.diff_id
        diff_ids = entry["image_config"]["rootfs"]["diff_ids"]
        diff_ids[diff_ids.index(ALL.diff_id)] = EVIL.diff_id

    change_meta_store(store, forge)
    shutil.rmtree(store / "images")
    lose_metadata(store)


def forge_the_command(store: Path) -> None:
    of_image(lambda entry: entry["image_config"]["config"].update(Cmd=["/bin/evil"]))(store)


def forge_the_command_and_the_copy(store: Path) -> None:
    forge_the_command(store)
    shutil.rmtree(store / "images")


def replaced(path_of: Callable[[Path, Layer], Path], put: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Something else in the place of a layer's directory or record."""

    def replace(store: Path) -> None:
        path = path_of(store, ALL)
        path.rename(store.with_name(f"{path.name}.away"))
        put(path)

    return replace


def rewrite_metadata(implied: list[str]) -> Callable[[Path], None]:
    def rewrite(store: Path) -> None:
        for path in (store / "records").glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"implied_directories": implied}))

    return rewrite


def link_away(path: Path) -> None:
    path.symlink_to(path.parent.parent.with_name(f"{path.name}.away"))


LIES: Final[dict[str, tuple[Callable[[Path], None], str]]] = {
    "a layer with all that belongs to it": (forge_a_layer, "no image's id proves"),
    "a command": (forge_the_command, "image_config"),
    "a command, and no copy": (forge_the_command_and_the_copy, "image_config"),
    "diff_ids": (
        of_image(lambda entry: entry["image_config"]["rootfs"]["diff_ids"].reverse()),
        "image_config",
    ),
    "the digest of the manifest": (of_image(lambda entry: entry.update(digest=EVIL.digest)), EVIL.digest),
    "no record": (lambda store: record_of(store, ALL).unlink(), "has no tar-split any more"),
    "a pipe for a record": (replaced(record_of, os.mkfifo), "tar-split: it is not a regular file"),
    "a directory for a record": (replaced(record_of, os.mkdir), "tar-split: it is not a regular file"),
    "a link for a record": (replaced(record_of, link_away), "tar-split: it is not a regular file"),
    "a link for a layer": (replaced(directory_of, link_away), "is not a directory"),
    "no metadata": (lose_metadata, "has a tar-split, but no metadata"),
    "metadata of other directories": (
        rewrite_metadata(["etc", "bin", "all"]),
        "directories without an entry",
    ),
    "metadata of no directories": (rewrite_metadata([]), "directories without an entry"),
}
NOT_REFUSED: Final = frozenset({"a command", "diff_ids", "a link for a layer"})
"""Of which a copy tells what is right, or which are no layers at all."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image in a file."""
    return f"oci:{write_layout(tmp_path_factory.mktemp('forged') / 'layout', {'1.0': SHOP})}"


@pytest.fixture(scope="module")
def reference() -> Iterator[str]:
    """The image at a registry."""
    with RegistrySimulator() as registry:
        yield registry.push("shop:1.0", SHOP)


@pytest.fixture(scope="module")
def scene(reference: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk with a store that was baked, out of its place."""
    with Tmpfs(tmp_path_factory.mktemp("forged") / "scene") as scene:
        bake(scene / "store", reference)
        (scene / "store").rename(scene / "pristine")
        yield scene


@pytest.fixture
def baked(scene: Path) -> Path:
    """A store that was baked, to be forged."""
    for left in scene.iterdir():
        if left.is_dir() and not left.is_symlink() and left.name != "pristine":
            shutil.rmtree(left)
        elif left.name != "pristine":
            left.unlink()
    run("cp", "--archive", str(scene / "pristine"), str(scene / "store"))
    return scene / "store"


def test_a_store_that_nobody_touched_is_proved(baked: Path) -> None:
    found = guestpulld("verify", baked, "--deep")
    assert (found.returncode, found.stdout) == (0, f"{baked} is sound\n")


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found(baked: Path, lie: str) -> None:
    tell, said = LIES[lie]
    tell(baked)

    found = guestpulld("verify", baked, "--deep")

    assert (found.returncode, found.stderr) == (1, "")
    assert said in found.stdout
    assert "is sound" not in found.stdout


def test_a_pipe_in_the_place_of_the_metadata_is_not_waited_for(baked: Path) -> None:
    for path in (baked / "records").glob("*.json"):
        path.unlink()
        os.mkfifo(path)

    found = guestpulld("verify", baked, "--deep")

    assert (found.returncode, found.stderr) == (1, "")
    assert "has a tar-split, but no metadata" in found.stdout


@pytest.mark.parametrize("place", [directory_of, record_of])
def test_what_is_wrong_with_one_layer_keeps_no_other_from_being_proved(
    baked: Path, place: Callable[[Path, Layer], Path]
) -> None:
    replaced(place, os.mkfifo)(baked)
    (directory_of(baked, TOP) / "no/longer").write_bytes(b"other")

    found = guestpulld("verify", baked, "--deep")

    assert "no/longer" in found.stdout
    assert "is no" in found.stdout


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie not in NOT_REFUSED])
def test_a_forged_store_that_is_only_read_is_refused(
    disk: Path, baked: Path, lie: str, reference: str
) -> None:
    LIES[lie][0](baked)
    with Daemon(disk, configuration={**PROVING, "additional_stores": [str(baked)]}) as daemon:
        with pytest.raises(DataLoss) as caught:
            daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert caught.value.reason in ("LAYER_CHANGED", "IMAGE_CHANGED")


def test_a_forged_command_is_not_run_where_the_copy_tells_the_right_one(
    disk: Path, baked: Path, reference: str
) -> None:
    forge_the_command(baked)
    with Daemon(disk, configuration={**PROVING, "additional_stores": [str(baked)]}) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        spec = json.loads((daemon.bundle("one") / "config.json").read_text())
        assert spec["process"]["args"] == ["/bin/ls"]


@pytest.mark.parametrize("lie", LIES)
def test_a_pull_gets_from_the_registry_what_is_not_proved_here(
    disk: Path, baked: Path, reference: str, lie: str
) -> None:
    LIES[lie][0](baked)

    with Daemon(disk, work_dir=baked, configuration=PROVING) as daemon:
        pulled = daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.IF_NOT_PRESENT)

        assert pulled.image_id == SHOP.image_id
        spec = json.loads((daemon.bundle("one") / "config.json").read_text())
        assert spec["process"]["args"] == ["/bin/ls"]
        assert not (daemon.bundle("one") / "rootfs/all/evil").exists()
        assert (daemon.bundle("one") / "rootfs/tmp").stat().st_mode == 0o41777
        assert (daemon.meta_store()["image_db"][SHOP.image_id]["digest"]) == SHOP.digest
        daemon.client.release_bundle(str(daemon.bundle("one")))


@pytest.mark.parametrize("lie", LIES)
def test_repairing_puts_a_lie_right(baked: Path, lie: str) -> None:
    kept = contents(baked)
    LIES[lie][0](baked)

    repaired = guestpulld("verify", baked, "--deep", "--repair")

    assert repaired.returncode == 0, repaired.stdout
    assert "is sound" in repaired.stdout
    assert "repaired: " in repaired.stdout
    assert contents(baked) == kept


@pytest.mark.parametrize("lie", LIES)
def test_baking_again_puts_a_lie_right(baked: Path, layout: str, reference: str, lie: str) -> None:
    kept = contents(baked)
    LIES[lie][0](baked)

    bake(baked, layout, reference)

    assert contents(baked) == kept


def test_a_copy_that_was_altered_is_written_again(baked: Path) -> None:
    kept = contents(baked)
    (copy,) = (baked / "images").iterdir()
    copy.write_text(copy.read_text().replace("/bin/ls", "/bin/sh"))

    repaired = guestpulld("verify", baked, "--repair")

    assert repaired.returncode == 0, repaired.stdout
    assert contents(baked) == kept


def test_what_only_a_file_has_is_to_be_baked_again(
    disk: Path, registry: RegistrySimulator, layout: str
) -> None:
    reference = registry.push("shop:1.0", image(BASE))
    bake(disk / "store", layout, reference)
    record_of(disk / "store", ALL).unlink()

    repaired = guestpulld("verify", disk / "store", "--deep", "--repair")

    assert repaired.returncode == 1
    assert "baked from a file, bake it again" in repaired.stdout
    assert "name and the tag" not in repaired.stdout


def test_a_layer_that_is_altered_here_and_in_another_store_is_not_mounted(
    disk: Path, baked: Path, layout: str, reference: str
) -> None:
    bake(disk / "work", layout, reference)
    for store in (baked, disk / "work"):
        (directory_of(store, TOP) / "no/longer").write_bytes(b"tampered")
    with Daemon(disk, configuration={**PROVING, "additional_stores": [str(baked)]}) as daemon:
        with pytest.raises(DataLoss) as caught:
            daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert caught.value.reason == "LAYER_CHANGED"
        assert str(baked) in caught.value.message


def test_a_layer_that_is_altered_here_is_taken_from_another_store_that_is_right(
    disk: Path, baked: Path, layout: str, reference: str
) -> None:
    bake(disk / "work", layout, reference)
    (directory_of(disk / "work", TOP) / "no/longer").write_bytes(b"tampered")
    with Daemon(disk, configuration={**PROVING, "additional_stores": [str(baked)]}) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert (daemon.bundle("one") / "rootfs/no/longer").read_bytes() == b"instead"


# -- stores of another program ---------------------------------------------------------------------------------


def as_image_rs(store: Path) -> None:
    """The same store, as if image-rs had made it: a config written anew, and nothing to prove anything by."""
    document = json.loads((store / "meta_store.json").read_text())
    (store / "meta_store.json").write_text(json.dumps(document, indent=1))
    shutil.rmtree(store / "images")
    shutil.rmtree(store / "records")
    lose_metadata(store)


def test_what_image_rs_wrote_is_said_to_be_unproved_and_not_to_be_sound(baked: Path) -> None:
    as_image_rs(baked)

    found = guestpulld("verify", baked, "--deep")

    assert found.returncode == 0, found.stdout
    assert "is sound" not in found.stdout
    assert f"no damage was found in {baked}; 0 layers are proved, 3 cannot be" in found.stdout


@pytest.mark.parametrize("mode", ["never", "mount", "always"])
def test_what_image_rs_wrote_is_used(disk: Path, baked: Path, mode: str, reference: str) -> None:
    as_image_rs(baked)
    with Daemon(disk, configuration={"verify_reuse": mode, "additional_stores": [str(baked)]}) as daemon:
        pulled = daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert [one.reused for one in pulled.layers] == [True] * 3


def test_a_config_that_another_program_wrote_anew_is_proved_by_its_copy(baked: Path) -> None:
    document = json.loads((baked / "meta_store.json").read_text())
    (baked / "meta_store.json").write_text(json.dumps(document, indent=1))

    found = guestpulld("verify", baked, "--deep")

    assert (found.returncode, found.stdout) == (0, f"{baked} is sound\n")
