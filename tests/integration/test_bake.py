"""Images that are there before the machine boots: baking them, and daemons that may only read what was baked."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from guestpull_client import PullPolicy
from guestpull_client.errors import FailedPrecondition, InvalidArgument, NotFound
from support.daemon import Daemon, Tmpfs
from support.images import Image, Layer, directory, file, files, image, index, layer
from support.local_images import write_layout
from support.peers import DockerRegistry, run, skopeo_copy
from support.samples import changes, everything, runnable
from support.trees import Node, differences, tree

GUEST: Final = "/run/kata-containers/image"
BASE: Final = runnable()
ALL: Final = everything()
TOP: Final = changes()
SHOP: Final = image(BASE, ALL, TOP, process={"Cmd": ["/bin/ls"]})
NAME: Final = "registry.example/shop:1.0"


def guestpulld(command: str, work_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "guestpull_server.cli", command, "--work-dir", str(work_dir)]
    return run(*program, *options, check=False)


def bake(work_dir: Path, *options: str) -> str:
    done = guestpulld("bake", work_dir, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def meta_store(work_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((work_dir / "meta_store.json").read_text())
    return content


def references(work_dir: Path) -> set[str]:
    entries = meta_store(work_dir)["image_db"].values()
    return {name for entry in entries for name in entry.get("references", [entry["reference"]])}


def names_of_layers(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "layers").iterdir())


def layer_trees(work_dir: Path, of: Image) -> list[dict[bytes, Node]]:
    """What each layer of an image holds, bottom-most first."""
    layer_db = meta_store(work_dir)["layer_db"]
    paths = (Path(layer_db[one.digest]["store_path"]) for one in of.layers)
    return [tree(work_dir / "layers" / path.name) for path in paths]


def directory_name(one: Layer) -> str:
    return one.digest.replace(":", "_")


@contextmanager
def read_only_image(store: Path, kind: str) -> Iterator[Path]:
    """A store as a file system of its own, mounted beside it."""
    made, place = store.with_suffix(".image"), store.with_suffix(".mounted")
    if kind == "squashfs":
        run("mksquashfs", str(store), str(made), "-quiet", "-no-progress")
    else:
        run("mkfs.erofs", "--quiet", str(made), str(store))
    place.mkdir()
    run("mount", "-t", kind, "-o", "loop,ro", str(made), str(place))
    try:
        yield place
    finally:
        run("umount", str(place))


@pytest.fixture(scope="module")
def shop(docker_registry: DockerRegistry) -> str:
    """The image, at a registry; its reference."""
    return docker_registry.push("bake/shop", "1.0", SHOP)


@pytest.fixture(scope="module")
def copies(shop: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The image as skopeo writes it to files, by the transport."""
    scratch = tmp_path_factory.mktemp("copies")
    places = {
        "oci": f"oci:{scratch}/layout:1.0",
        "oci-archive": f"oci-archive:{scratch}/oci.tar:quay.io/org/shop:1.0",
        "docker-archive": f"docker-archive:{scratch}/docker.tar:quay.io/org/shop:1.0",
    }
    for place in places.values():
        skopeo_copy(f"docker://{shop}", place)
    return places


@pytest.fixture(scope="module")
def baked_once(copies: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with the image in it, made for a guest that sees it elsewhere."""
    with Tmpfs(tmp_path_factory.mktemp("baked") / "disk") as directory_of_all:
        bake(directory_of_all / "baked", "--guest-work-dir", GUEST, copies["oci"], "--reference", NAME)
        yield directory_of_all / "baked"


@pytest.fixture
def baked(disk: Path, baked_once: Path) -> Path:
    """The same, for a test to do with as it likes."""
    run("cp", "--archive", str(baked_once), str(disk / "baked"))
    return disk / "baked"


# -- sources ---------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(disk: Path, shop: str) -> list[dict[bytes, Node]]:
    """The layers as they come from a registry."""
    bake(disk / "expected", shop)
    return layer_trees(disk / "expected", SHOP)


def test_an_image_of_a_registry_is_baked(disk: Path, shop: str) -> None:
    said = bake(disk / "store", shop)

    assert f"baked {shop}: image {SHOP.image_id}, 3 layers, 3 new" in said
    entry = meta_store(disk / "store")["image_db"][SHOP.image_id]
    assert (entry["digest"], entry["reference"]) == (SHOP.digest, shop)
    assert entry["image_config"] == json.loads(SHOP.config)
    assert names_of_layers(disk / "store") == sorted(directory_name(one) for one in SHOP.layers)


@pytest.mark.parametrize("kind", ["oci", "oci-archive"])
def test_a_layout_is_baked_as_its_registrys_image(
    disk: Path, copies: dict[str, str], expected: list[dict[bytes, Node]], kind: str
) -> None:
    bake(disk / "store", copies[kind], "--reference", NAME)

    entry = meta_store(disk / "store")["image_db"][SHOP.image_id]
    assert (entry["digest"], entry["reference"]) == (SHOP.digest, NAME)
    for ours, theirs in zip(layer_trees(disk / "store", SHOP), expected, strict=True):
        assert differences(ours, theirs) == []


def test_a_docker_archive_is_baked_with_the_same_layers(
    disk: Path, copies: dict[str, str], expected: list[dict[bytes, Node]]
) -> None:
    bake(disk / "store", copies["docker-archive"], "--reference", NAME)

    store = meta_store(disk / "store")
    (entry,) = store["image_db"].values()
    assert entry["reference"] == NAME
    assert [one["uncompressed_digest"] for one in entry["layer_metas"]] == SHOP.diff_ids
    assert {one["decoder"] for one in entry["layer_metas"]} == {"Uncompressed"}
    for one, theirs in zip(entry["layer_metas"], expected, strict=True):
        assert differences(tree(one["store_path"]), theirs) == []


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_an_archive_says_itself_what_its_image_is_called(
    disk: Path, copies: dict[str, str], kind: str
) -> None:
    bake(disk / "store", copies[kind])
    assert references(disk / "store") == {"quay.io/org/shop:1.0"}


def test_an_image_without_a_name_must_be_given_one(disk: Path, copies: dict[str, str]) -> None:
    done = guestpulld("bake", disk / "store", copies["oci"])
    assert done.returncode == 1
    assert "Name it with --reference." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reference_is_written_in_full(disk: Path, copies: dict[str, str]) -> None:
    bake(disk / "store", copies["oci"], "--reference", "shop")
    assert references(disk / "store") == {"docker.io/library/shop:latest"}


def test_another_machines_image_is_baked_by_its_platform(disk: Path, docker_registry: DockerRegistry) -> None:
    arm = image(BASE, platform="linux/arm64/v8")
    reference = docker_registry.push("bake/both", "1", index(SHOP, arm))
    bake(disk / "store", "--platform", "linux/arm64", reference)
    assert set(meta_store(disk / "store")["image_db"]) == {arm.image_id}


# -- many images, and the store as it was ----------------------------------------------------------------------


def test_a_list_names_many_images(
    disk: Path, tmp_path: Path, shop: str, copies: dict[str, str], docker_registry: DockerRegistry
) -> None:
    other = docker_registry.push("bake/other", "1", image(BASE))
    wanted = tmp_path / "list"
    wanted.write_text(
        f"# what the guest runs\n\n{shop}\n{other} registry.example/other:2  # by another name\n"
        f"{copies['docker-archive']} {NAME}\n"
    )
    bake(disk / "store", "--file", str(wanted))
    assert references(disk / "store") == {shop, "registry.example/other:2", NAME}


def test_a_list_may_begin_with_a_mark_and_its_sources_may_have_a_hash_in_their_names(
    disk: Path, tmp_path: Path, shop: str
) -> None:
    layout = write_layout(disk / "build#7", {"1": image(BASE)})
    wanted = tmp_path / "list"
    wanted.write_text(f"{shop}\r\noci:{layout} {NAME}  #7, the last one\r\n", encoding="utf-8-sig")
    bake(disk / "store", "--file", str(wanted))
    assert references(disk / "store") == {shop, NAME}


def test_a_list_that_cannot_be_understood_is_refused_by_its_line(disk: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "list"
    wanted.write_text("# one\nfirst second third\n")
    done = guestpulld("bake", disk / "store", "--file", str(wanted))
    assert done.returncode == 1
    assert f"{wanted}, line 2" in done.stderr
    assert not (disk / "store").exists()


def test_a_second_image_costs_only_what_is_new(
    disk: Path, shop: str, docker_registry: DockerRegistry
) -> None:
    own = layer(*files("own", count=3))
    other = docker_registry.push("bake/second", "1", image(BASE, ALL, own))
    bake(disk / "store", shop)
    before = tree(disk / "store/layers" / directory_name(ALL))

    assert "3 layers, 1 new" in bake(disk / "store", other)

    assert references(disk / "store") == {shop, other}
    assert differences(tree(disk / "store/layers" / directory_name(ALL)), before) == []


def test_an_image_is_removed_with_the_layers_that_it_alone_has(
    disk: Path, shop: str, docker_registry: DockerRegistry
) -> None:
    small = image(BASE)
    other = docker_registry.push("bake/small", "1", small)
    bake(disk / "store", shop, other)

    assert bake(disk / "store", "--remove", shop) == f"removed {shop}\n"

    assert set(meta_store(disk / "store")["image_db"]) == {small.image_id}
    assert names_of_layers(disk / "store") == [directory_name(BASE)]
    assert guestpulld("verify", disk / "store").returncode == 0


def test_removing_what_is_not_there_is_refused(disk: Path, baked: Path) -> None:
    before = tree(baked)
    done = guestpulld("bake", baked, "--guest-work-dir", GUEST, "--remove", "registry.example/none:1")
    assert done.returncode == 1
    assert "registry.example/none:1" in done.stderr
    assert differences(tree(baked), before) == []


# -- names, paths, and sameness --------------------------------------------------------------------------------


def test_layers_are_named_by_running_numbers_where_image_rs_needs_it(
    disk: Path, shop: str, docker_registry: DockerRegistry
) -> None:
    own = layer(*files("own", count=3))
    other = docker_registry.push("bake/numbered", "1", image(BASE, own))
    numbered = ("--layer-names", "index", "--guest-work-dir", GUEST)
    bake(disk / "store", *numbered, shop)
    assert names_of_layers(disk / "store") == ["0", "1", "2"]

    bake(disk / "store", *numbered, other)

    assert names_of_layers(disk / "store") == ["0", "1", "2", "3"]
    layer_db = meta_store(disk / "store")["layer_db"]
    places = [layer_db[one.digest]["store_path"] for one in (*SHOP.layers, own)]
    assert places == [f"{GUEST}/layers/{number}" for number in range(4)]
    assert guestpulld("verify", disk / "store", "--deep", "--guest-work-dir", GUEST).returncode == 0


def test_layers_go_on_being_named_as_they_are(disk: Path, shop: str, docker_registry: DockerRegistry) -> None:
    other = docker_registry.push("bake/named", "1", image(BASE, layer(*files("own", count=3))))
    bake(disk / "store", "--layer-names", "index", shop)

    bake(disk / "store", other)

    assert names_of_layers(disk / "store") == ["0", "1", "2", "3"]
    mixed = guestpulld("bake", disk / "store", "--layer-names", "digest", other)
    assert mixed.returncode == 1
    assert "named by index" in mixed.stderr
    assert guestpulld("verify", disk / "store", "--deep").returncode == 0


def test_a_stores_paths_are_written_anew_for_a_guest_that_is_told_later(
    disk: Path, copies: dict[str, str], baked: Path
) -> None:
    bake(disk / "store", copies["oci"], "--reference", NAME)

    bake(disk / "store", "--guest-work-dir", GUEST, copies["oci"], "--reference", NAME)

    assert (disk / "store/meta_store.json").read_bytes() == (baked / "meta_store.json").read_bytes()


def test_paths_are_written_as_the_guest_will_see_them(baked: Path) -> None:
    store = meta_store(baked)
    metas = [*store["layer_db"].values(), *store["image_db"][SHOP.image_id]["layer_metas"]]
    assert len(metas) == 6
    assert all(one["store_path"].startswith(f"{GUEST}/layers/sha256_") for one in metas)
    assert str(baked).encode() not in (baked / "meta_store.json").read_bytes()


def test_a_store_that_was_made_for_a_guest_goes_on_being_made_for_it(
    baked: Path, docker_registry: DockerRegistry
) -> None:
    more = docker_registry.push("bake/more", "1", image(BASE, layer(*files("more", count=3))))

    bake(baked, more)

    entries = meta_store(baked)["layer_db"].values()
    assert {Path(one["store_path"]).parent for one in entries} == {Path(GUEST) / "layers"}


def test_a_layer_that_is_repaired_is_where_the_guest_sees_the_others(disk: Path, shop: str) -> None:
    bake(disk / "store", "--guest-work-dir", GUEST, shop)
    before = (disk / "store/meta_store.json").read_bytes()
    shutil.rmtree(disk / "store/layers" / directory_name(TOP))

    repaired = guestpulld("verify", disk / "store", "--repair")

    assert repaired.returncode == 0, repaired.stdout
    assert (disk / "store/meta_store.json").read_bytes() == before


@pytest.mark.parametrize("command", ["bake", "verify", "gc"])
def test_the_guests_path_must_be_absolute(disk: Path, command: str) -> None:
    more = ["oci:layout"] if command == "bake" else []
    refused = guestpulld(command, disk / "store", "--guest-work-dir", "var/lib/store", *more)
    assert (refused.returncode, "'var/lib/store' is not absolute" in refused.stderr) == (2, True)
    assert not (disk / "store").exists()


@pytest.mark.parametrize("levels_up", [0, 1, -1])
def test_the_guests_path_may_be_one_that_leads_to_the_store_here(
    disk: Path, copies: dict[str, str], levels_up: int
) -> None:
    guest = str((disk / "build/store").parents[levels_up])
    for said in (["--guest-work-dir", guest], [], ["--guest-work-dir", guest]):
        bake(disk / "build/store", *said, copies["oci"], "--reference", NAME)

    (path, *_) = {Path(one["store_path"]) for one in meta_store(disk / "build/store")["layer_db"].values()}
    assert path.parent == Path(guest) / "layers"
    sound = guestpulld("verify", disk / "build/store", "--deep")
    assert sound.stdout == f"{disk}/build/store is sound\n"


def test_a_damaged_store_is_mended_as_its_guest_sees_it(baked: Path) -> None:
    before = (baked / "meta_store.json").read_bytes()
    (baked / "meta_store.json").write_bytes(before[:-1])

    repaired = guestpulld("verify", baked, "--repair")

    assert repaired.returncode == 0, repaired.stdout
    assert (baked / "meta_store.json").read_bytes() == before


def test_a_full_disk_takes_an_image_that_is_there_already(disk: Path, copies: dict[str, str]) -> None:
    with Tmpfs(disk / "small", "16m") as small:
        bake(small / "store", copies["oci"], "--reference", NAME)
        with suppress(OSError), (small / "fill").open("wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))

        assert "0 new" in bake(small / "store", copies["oci"], "--reference", NAME)

        assert guestpulld("verify", small / "store", "--deep").stdout == f"{small}/store is sound\n"


def test_a_layer_is_repaired_from_whichever_registry_has_its_image(
    disk: Path, shop: str, copies: dict[str, str]
) -> None:
    gone = shop.replace("bake/shop", "bake/gone")
    bake(disk / "store", copies["oci"], "--reference", gone)
    bake(disk / "store", shop)
    shutil.rmtree(disk / "store/layers" / directory_name(TOP))

    repaired = guestpulld("verify", disk / "store", "--repair")

    assert repaired.returncode == 0, repaired.stdout
    assert references(disk / "store") == {gone, shop}


def test_where_the_guest_sees_a_store_must_be_said_if_its_layers_are_written_down_in_two_places(
    disk: Path, baked: Path, copies: dict[str, str], docker_registry: DockerRegistry
) -> None:
    baked.rename(disk / "work")
    with Daemon(disk) as daemon:
        more = docker_registry.push("bake/served", "1", image(BASE, layer(*files("served", count=3))))
        daemon.client.pull(more, str(daemon.bundle("one")))

    refused = guestpulld("bake", disk / "work", copies["docker-archive"])
    assert refused.returncode == 1
    assert {GUEST, str(disk / "work")} <= set(refused.stderr.replace(". ", " ").split())
    bake(disk / "work", copies["docker-archive"], "--guest-work-dir", GUEST)
    assert str(disk).encode() not in (disk / "work/meta_store.json").read_bytes()


def test_a_baked_store_holds_images_and_layers_and_nothing_of_its_making(baked: Path) -> None:
    assert {path.name for path in baked.iterdir()} == {
        "meta_store.json",
        "images",
        "layers",
        "records",
    }


@pytest.mark.parametrize("naming", ["digest", "index"])
def test_the_same_input_gives_the_same_bytes_and_times(
    disk: Path, shop: str, copies: dict[str, str], naming: str
) -> None:
    options = ("--layer-names", naming, "--guest-work-dir", GUEST)
    bake(disk / "one", *options, shop)
    time.sleep(1.1)  # whole seconds would hide a time of making
    bake(disk / "elsewhere/two", *options, shop)

    one, two = tree(disk / "one"), tree(disk / "elsewhere/two")
    assert any(path.startswith(b"layers/") and path.endswith(b"all/exact") for path in one)
    assert differences(one, two) == []


def test_the_order_of_images_does_not_matter(disk: Path, shop: str, docker_registry: DockerRegistry) -> None:
    other = docker_registry.push("bake/order", "1", image(BASE, layer(*files("own", count=3))))
    third = docker_registry.push("bake/order", "2", image(layer(file("alone"))))
    bake(disk / "one", "--guest-work-dir", GUEST, shop, other, third)
    bake(disk / "two", "--guest-work-dir", GUEST, third)
    bake(disk / "two", "--guest-work-dir", GUEST, other, shop)
    assert differences(tree(disk / "one"), tree(disk / "two")) == []


def test_the_order_of_an_images_names_does_not_matter(disk: Path, copies: dict[str, str]) -> None:
    wanted = [f"{copies['oci']} registry.example/{name}:1" for name in ("b", "a", "c")]
    for store, lines in (("one", wanted), ("two", wanted[::-1])):
        (disk / "list").write_text("\n".join(lines))
        bake(disk / store, "--file", str(disk / "list"))
        # the paths of the two are not the same; all else is
        content = (disk / store / "meta_store.json").read_text().replace(f"{disk}/{store}/", "")
        (disk / f"{store}.json").write_text(content)
    assert (disk / "one.json").read_text() == (disk / "two.json").read_text()
    assert meta_store(disk / "one")["image_db"][SHOP.image_id]["references"] == [
        f"registry.example/{name}:1" for name in ("a", "b", "c")
    ]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_umask_of_who_bakes_does_not_matter(
    disk: Path, baked: Path, copies: dict[str, str], umask: int
) -> None:
    command = [sys.executable, "-m", "guestpull_server.cli", "bake", "--work-dir", str(disk / "again")]
    command += ["--guest-work-dir", GUEST, copies["oci"], "--reference", NAME]
    subprocess.run(command, umask=umask, check=True, stdout=subprocess.DEVNULL)
    assert differences(tree(baked), tree(disk / "again")) == []


def test_gc_and_repair_leave_no_trace_where_there_is_nothing_to_do(disk: Path, baked: Path) -> None:
    run("cp", "--archive", str(baked), str(disk / "before"))
    for command in (["gc"], ["verify", "--repair"], ["verify", "--deep", "--repair"]):
        done = guestpulld(command[0], baked, *command[1:], "--guest-work-dir", GUEST)
        assert done.returncode == 0, done.stdout
        assert differences(tree(baked), tree(disk / "before")) == []


def test_gc_leaves_a_baked_store_as_if_the_garbage_had_never_been_there(disk: Path, baked: Path) -> None:
    run("cp", "--archive", str(baked), str(disk / "before"))
    (baked / "layers/sha256_garbage").mkdir()
    collected = guestpulld("gc", baked, "--guest-work-dir", GUEST)
    assert "deleted 1 things" in collected.stdout
    assert differences(tree(baked), tree(disk / "before")) == []


@pytest.mark.parametrize("order", [("oci", "docker-archive"), ("docker-archive", "oci")])
def test_an_image_that_is_baked_in_another_form_leaves_nothing_of_the_first(
    disk: Path, copies: dict[str, str], order: tuple[str, str]
) -> None:
    for kind in order:
        bake(disk / "store", copies[kind], "--reference", NAME)
    assert len(names_of_layers(disk / "store")) == len(SHOP.layers)
    assert "deleted 0 things" in guestpulld("gc", disk / "store").stdout


def test_a_name_that_is_pinned_to_an_earlier_form_leads_to_the_image(
    disk: Path, copies: dict[str, str]
) -> None:
    pinned = f"registry.example/shop@{SHOP.digest}"
    bake(disk / "store", copies["oci"], "--reference", pinned)
    bake(disk / "store", copies["docker-archive"], "--reference", NAME)
    assert references(disk / "store") == {pinned, NAME}
    assert guestpulld("verify", disk / "store", "--deep").stdout == f"{disk}/store is sound\n"
    with Daemon(disk, configuration={"additional_stores": [str(disk / "store")]}) as daemon:
        for name in (pinned, NAME):
            pulled = daemon.client.pull(name, str(daemon.bundle(name[-3:])), policy=PullPolicy.NEVER)
            assert (pulled.image_id, pulled.downloaded_bytes) == (SHOP.image_id, 0)
        assert not (daemon.work_dir / "meta_store.json").exists()


def test_a_pinned_source_that_is_there_already_is_a_name_only_if_it_is_given_as_one(
    disk: Path, copies: dict[str, str]
) -> None:
    elsewhere = f"other.example/there@{SHOP.digest}"
    bake(disk / "store", copies["oci"], "--reference", NAME)

    bake(disk / "store", elsewhere)
    assert references(disk / "store") == {NAME}

    bake(disk / "store", elsewhere, "--reference", elsewhere)
    assert references(disk / "store") == {NAME, elsewhere}


def test_a_name_that_is_pinned_to_another_image_is_refused(disk: Path, copies: dict[str, str]) -> None:
    other = f"registry.example/shop@{OF_IMAGE_RS.digest}"
    refused = guestpulld("bake", disk / "store", copies["oci"], "--reference", other)
    assert refused.returncode == 1
    assert SHOP.digest in refused.stderr
    assert not (disk / "store/meta_store.json").exists()


def test_a_name_that_is_pinned_to_an_index_of_a_file_is_its_name(disk: Path, copies: dict[str, str]) -> None:
    both = index(SHOP, image(layer(file("arm")), platform="linux/arm64"))
    write_layout(disk / "layout", {"1.0": both})
    pinned = f"registry.example/shop@{both.digest}"
    bake(disk / "work", f"oci:{disk}/layout", "--reference", pinned)
    with Daemon(disk) as daemon:
        pulled = daemon.client.pull(pinned, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert pulled.manifest_digest == SHOP.digest


def test_a_name_that_is_pinned_to_the_image_is_its_name(disk: Path, copies: dict[str, str]) -> None:
    pinned = f"registry.example/shop@{SHOP.digest}"
    bake(disk / "work", copies["oci"], "--reference", pinned)
    with Daemon(disk) as daemon:
        pulled = daemon.client.pull(pinned, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert pulled.manifest_digest == SHOP.digest


def test_baking_again_changes_nothing(baked: Path, copies: dict[str, str]) -> None:
    before = tree(baked)
    assert "0 new, 0.0 MB" in bake(baked, "--guest-work-dir", GUEST, copies["oci"], "--reference", NAME)
    assert differences(tree(baked), before) == []


def test_what_was_added_and_removed_again_leaves_no_trace(
    baked: Path, docker_registry: DockerRegistry
) -> None:
    before = tree(baked)
    other = docker_registry.push("bake/trace", "1", image(BASE, layer(*files("own", count=3))))
    bake(baked, "--guest-work-dir", GUEST, other)
    bake(baked, "--guest-work-dir", GUEST, "--remove", other)
    assert differences(tree(baked), before) == []


def test_verify_takes_the_guests_view_and_names_a_layer_that_is_gone(baked: Path) -> None:
    sound = guestpulld("verify", baked, "--deep", "--guest-work-dir", GUEST)
    assert (sound.returncode, sound.stdout) == (0, f"{baked} is sound\n")
    shutil.rmtree(baked / "layers" / directory_name(TOP))

    found = guestpulld("verify", baked, "--guest-work-dir", GUEST)

    assert found.returncode == 1
    assert TOP.digest in found.stdout


def test_bake_and_gc_say_what_they_put_right(baked: Path, copies: dict[str, str]) -> None:
    def spoil() -> None:
        spoilt = meta_store(baked)
        spoilt["layer_db"][BASE.digest]["uncompressed_digest"] = TOP.diff_id
        (baked / "meta_store.json").write_text(json.dumps(spoilt))
        (baked / "layers" / f"sha256_{'0' * 64}").mkdir(exist_ok=True)

    for command in (["gc"], ["bake", copies["oci"], "--reference", NAME], ["verify", "--repair"]):
        spoil()
        said = guestpulld(command[0], baked, *command[1:]).stderr
        assert f"the entry of layer {BASE.digest} was corrected" in said


def test_gc_says_why_it_does_not_delete_what_it_cannot_judge(baked: Path) -> None:
    stray = baked / "layers" / f"sha256_{'0' * 64}"
    stray.mkdir()
    (baked / "meta_store.json").write_text("{")
    collected = guestpulld("gc", baked, "--dry-run")
    assert "meta_store.json is damaged" in collected.stderr
    assert stray.exists()


def test_gc_takes_the_guests_view_and_deletes_only_what_no_image_has(baked: Path) -> None:
    before = tree(baked / "layers")
    stray = baked / "layers" / f"sha256_{'0' * 64}"
    stray.mkdir()
    (stray / "file").write_bytes(b"left over")

    would = guestpulld("gc", baked, "--guest-work-dir", GUEST, "--dry-run")
    assert str(stray) in would.stdout
    assert stray.exists()
    done = guestpulld("gc", baked, "--guest-work-dir", GUEST)

    assert done.returncode == 0, done.stderr
    assert "deleted 1 things" in done.stdout
    assert differences(tree(baked / "layers"), before, ignoring=frozenset({"mtime_ns"})) == []


def test_a_bake_that_fails_keeps_the_images_before_it(disk: Path, copies: dict[str, str]) -> None:
    nowhere = "127.0.0.1:1/none:1"
    fast = disk / "fast.json"
    fast.write_text('{"limits": {"max_attempts": 1}}')
    wanted = disk / "list"
    wanted.write_text(f"{copies['oci']} {NAME}\n{nowhere}\n")

    done = guestpulld("bake", disk / "store", "--config", str(fast), "--file", str(wanted))

    assert done.returncode == 1
    assert references(disk / "store") == {NAME}
    assert guestpulld("verify", disk / "store", "--deep").returncode == 0
    assert not (disk / "store/staging").exists()


# -- a store that is only read ---------------------------------------------------------------------------------


def reading(*stores: Path, **more: object) -> dict[str, object]:
    """The configuration of a daemon with additional stores."""
    return {"additional_stores": [str(one) for one in stores], **more}


def test_a_baked_image_is_mounted_with_nothing_to_download(disk: Path, baked: Path, shop: str) -> None:
    with Daemon(disk, work_dir=disk / "pulled") as registrys:
        expected = tree(registrys.client.pull(shop, str(registrys.bundle("expected"))).rootfs_path)
    before = tree(baked)

    with Daemon(disk, configuration=reading(baked)) as daemon:
        # no such host: whoever asked it would fail
        pulled = daemon.client.pull(NAME, str(daemon.bundle("one")), policy=PullPolicy.IF_NOT_PRESENT)

        assert (pulled.image_id, pulled.downloaded_bytes) == (SHOP.image_id, 0)
        assert [one.reused for one in pulled.layers] == [True, True, True]
        assert differences(tree(pulled.rootfs_path), expected) == []
        Path(pulled.rootfs_path, "all/big").write_bytes(b"changed by the container")
        daemon.client.release_bundle(str(daemon.bundle("one")))
        assert list((daemon.work_dir / "layers").iterdir()) == []
    assert differences(tree(baked), before) == []


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_a_baked_store_may_be_an_image_of_a_file_system(disk: Path, baked: Path, kind: str) -> None:
    with (
        read_only_image(baked, kind) as place,
        Daemon(disk, configuration=reading(place, verify_reuse="always")) as daemon,
    ):
        pulled = daemon.client.pull(NAME, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert pulled.downloaded_bytes == 0
        assert Path(pulled.rootfs_path, "no/longer").read_bytes() == b"instead"
        assert sorted(path.name for path in Path(pulled.rootfs_path, "no").iterdir()) == ["longer"]
        assert guestpulld("verify", place, "--deep", "--guest-work-dir", GUEST).returncode == 0


def test_what_lies_in_a_read_only_store_is_shown_so(disk: Path, baked: Path) -> None:
    with Daemon(disk, configuration=reading(baked)) as daemon:
        (listed,) = daemon.client.images()
        assert (listed.reference, listed.read_only_store) == (NAME, str(baked))
        layers = daemon.client.layers(NAME)
        assert [one.compressed_digest for one in layers] == [one.digest for one in SHOP.layers]
        assert all(one.read_only and one.present for one in layers)
        assert all(one.store_path.startswith(f"{baked}/layers/") for one in layers)
        assert all(one.size_bytes > 0 for one in layers)


@pytest.mark.parametrize("force", [False, True])
def test_removing_an_image_of_a_read_only_store_is_refused(disk: Path, baked: Path, force: bool) -> None:
    before = tree(baked)
    with Daemon(disk, configuration=reading(baked)) as daemon:
        with pytest.raises(FailedPrecondition, match="is in the read-only store") as refused:
            daemon.client.remove_image(NAME, force=force)
        assert refused.value.reason == "READ_ONLY_IMAGE"
        assert [one.id for one in daemon.client.images()] == [SHOP.image_id]
    assert differences(tree(baked), before) == []


def test_only_what_a_read_only_store_lacks_is_downloaded(
    disk: Path, baked: Path, docker_registry: DockerRegistry
) -> None:
    own = layer(directory("own"), file("own/file", b"new"))
    reference = docker_registry.push("bake/mixed", "1", image(BASE, ALL, own))
    before = tree(baked)
    with Daemon(disk, configuration=reading(baked)) as daemon:
        pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

        assert [one.reused for one in pulled.layers] == [True, True, False]
        assert Path(pulled.rootfs_path, "own/file").read_bytes() == b"new"
        assert [one.read_only for one in daemon.client.layers(reference)] == [True, True, False]
        daemon.client.release_bundle(str(daemon.bundle("one")))
        removed = daemon.client.remove_image(reference)
        assert removed.deleted_layers == (own.digest,)
    assert differences(tree(baked), before) == []


def test_an_image_may_have_layers_of_two_read_only_stores(
    disk: Path, docker_registry: DockerRegistry
) -> None:
    stores = (disk / "first", disk / "second")
    for store, one in zip(stores, (BASE, ALL), strict=True):
        bake(store, "--guest-work-dir", GUEST, docker_registry.push(f"bake/{store.name}", "1", image(one)))
    before = [tree(store) for store in stores]
    both = docker_registry.push("bake/of-two-stores", "1", image(BASE, ALL))

    with Daemon(disk, configuration=reading(*stores)) as daemon:
        pulled = daemon.client.pull(both, str(daemon.bundle("one")))

        assert pulled.downloaded_bytes == 0
        assert Path(pulled.rootfs_path, "bin/busybox").is_file()
        assert Path(pulled.rootfs_path, "all/noted").is_file()
        paths = [one.store_path for one in daemon.client.layers(both)]
        assert [Path(path).parents[1] for path in paths] == list(stores)
    assert [
        differences(tree(store), tree_before) for store, tree_before in zip(stores, before, strict=True)
    ] == [
        [],
        [],
    ]


def test_what_no_store_has_is_not_found_without_a_network(disk: Path, baked: Path) -> None:
    with Daemon(disk, configuration=reading(baked)) as daemon:
        with pytest.raises(NotFound):
            daemon.client.pull("registry.example/other:1", str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert not daemon.bundle("one").exists()


def test_a_baked_store_may_be_the_work_directory_itself(disk: Path, copies: dict[str, str]) -> None:
    """image-rs's way: the file is left where it is."""
    bake(disk / "work", copies["oci"], "--reference", NAME)
    with Daemon(disk) as daemon:
        pulled = daemon.client.pull(NAME, str(daemon.bundle("one")), policy=PullPolicy.NEVER)
        assert pulled.downloaded_bytes == 0
        assert not any(one.read_only for one in daemon.client.layers(NAME))
        daemon.client.release_bundle(str(daemon.bundle("one")))
        removed = daemon.client.remove_image(NAME)
        assert set(removed.deleted_layers) == {one.digest for one in SHOP.layers}


# -- local images by PullImage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_pulling_a_local_image_is_refused_unless_it_is_allowed(
    daemon: Daemon, copies: dict[str, str], kind: str
) -> None:
    with pytest.raises(InvalidArgument, match="allow_local_images"):
        daemon.client.pull(copies[kind], str(daemon.bundle("one")))
    assert daemon.client.images() == ()
    assert not daemon.bundle("one").exists()


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_a_local_image_is_pulled_where_it_is_allowed(disk: Path, copies: dict[str, str], kind: str) -> None:
    with Daemon(disk, configuration={"allow_local_images": True}) as daemon:
        pulled = daemon.client.pull(copies[kind], str(daemon.bundle("one")))
        assert pulled.reference == "quay.io/org/shop:1.0"
        assert Path(pulled.rootfs_path, "no/longer").read_bytes() == b"instead"
        again = daemon.client.pull("quay.io/org/shop:1.0", str(daemon.bundle("two")), policy=PullPolicy.NEVER)
        assert again.image_id == pulled.image_id


# -- stores that image-rs wrote --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Generation:
    """How image-rs named layers' directories, and what it said of their compression."""

    names: Callable[[int, Layer], str]
    decoder: str


GENERATIONS: Final = {
    "2024": Generation(lambda _number, one: directory_name(one), "Gzip"),
    # says Gzip of whatever it is
    "2026": Generation(lambda number, _one: str(number), "Gzip"),
}
OF_IMAGE_RS: Final = image(
    layer(directory("bin"), file("bin/tool", b"#!", mode=0o755)),
    layer(directory("srv"), *files("srv", count=5), compression="zstd"),
    process={"Cmd": ["/bin/tool"]},
)


def write_as_image_rs(work_dir: Path, of: Image, reference: str, generation: Generation) -> None:
    """What image-rs leaves of a pull: layers unpacked by tar, and meta_store.json; no records, no facts."""
    metas = []
    for number, one in enumerate(of.layers):
        place = work_dir / "layers" / generation.names(number, one)
        place.mkdir(parents=True)
        subprocess.run(["tar", "--extract", "--directory", str(place)], input=one.tar, check=True)
        metas.append(
            {
                "decoder": generation.decoder,
                "encrypted": False,
                "compressed_digest": one.digest,
                "uncompressed_digest": one.diff_id,
                "store_path": str(place),
            }
        )
    entry = {
        "id": of.image_id,
        "digest": of.digest,
        "reference": reference,
        "image_config": json.loads(of.config),
        "signed": True,
        "layer_metas": metas,
        "of_tomorrow": {"kept": [1, 2, 3]},
    }
    store = {
        "image_db": {of.image_id: entry},
        "layer_db": {one["compressed_digest"]: one for one in metas},
        "snapshot_db": {"overlay": 2},
        "another_db": {"key": "value"},
    }
    (work_dir / "meta_store.json").write_text(json.dumps(store))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("way", ["left there", "copied", "read-only"])
def test_layers_that_image_rs_unpacked_are_reused(disk: Path, generation: str, way: str) -> None:
    theirs = disk / ("work" if way == "left there" else "theirs")
    write_as_image_rs(theirs, OF_IMAGE_RS, NAME, GENERATIONS[generation])
    (theirs / "layers").chmod(0o700)  # as a daemon that takes a work directory over makes it
    before = tree(theirs / "layers")
    if way == "copied":
        (disk / "work").mkdir()
        shutil.copy(theirs / "meta_store.json", disk / "work")

    with Daemon(disk, configuration=reading(theirs) if way == "read-only" else {}) as daemon:
        pulled = daemon.client.pull(NAME, str(daemon.bundle("one")), policy=PullPolicy.NEVER)

        assert (pulled.image_id, pulled.downloaded_bytes) == (OF_IMAGE_RS.image_id, 0)
        assert Path(pulled.rootfs_path, "bin/tool").read_bytes() == b"#!"
        assert len(list(Path(pulled.rootfs_path, "srv").iterdir())) == 5
        listed = daemon.client.layers(NAME)
        assert [one.read_only for one in listed] == [way != "left there"] * 2
    assert differences(tree(theirs / "layers"), before, ignoring=frozenset({"mtime_ns"})) == []


@pytest.mark.parametrize("generation", GENERATIONS)
def test_an_image_that_shares_layers_with_image_rss_store_downloads_only_the_rest(
    disk: Path, docker_registry: DockerRegistry, generation: str
) -> None:
    write_as_image_rs(disk / "work", OF_IMAGE_RS, NAME, GENERATIONS[generation])
    own = layer(file("own", b"new"))
    reference = docker_registry.push(f"bake/over-{generation}", "1", image(*OF_IMAGE_RS.layers, own))
    with Daemon(disk) as daemon:
        pulled = daemon.client.pull(reference, str(daemon.bundle("one")))
        assert [one.reused for one in pulled.layers] == [True, True, False]
        assert Path(pulled.rootfs_path, "own").read_bytes() == b"new"
        store = daemon.meta_store()
    assert store["another_db"] == {"key": "value"}
    assert store["snapshot_db"] == {"overlay": 2}
    assert store["image_db"][OF_IMAGE_RS.image_id]["of_tomorrow"] == {"kept": [1, 2, 3]}
    assert store["image_db"][OF_IMAGE_RS.image_id]["signed"] is True


@pytest.mark.parametrize("generation", GENERATIONS)
def test_baking_adds_to_a_store_of_image_rs_in_its_own_way_of_naming(
    disk: Path, docker_registry: DockerRegistry, generation: str
) -> None:
    write_as_image_rs(disk / "store", OF_IMAGE_RS, NAME, GENERATIONS[generation])
    own = layer(file("own", b"new"))
    reference = docker_registry.push(f"bake/added-{generation}", "1", image(*OF_IMAGE_RS.layers, own))
    naming = "index" if generation == "2026" else "digest"

    assert "3 layers, 1 new" in bake(disk / "store", "--layer-names", naming, reference)

    added = "2" if generation == "2026" else directory_name(own)
    assert meta_store(disk / "store")["layer_db"][own.digest]["store_path"] == f"{disk}/store/layers/{added}"
    assert references(disk / "store") == {NAME, reference}


def test_a_layer_of_image_rs_is_said_to_have_no_proof(disk: Path) -> None:
    write_as_image_rs(disk / "store", OF_IMAGE_RS, NAME, GENERATIONS["2026"])
    found = guestpulld("verify", disk / "store", "--deep")
    for one in OF_IMAGE_RS.layers:
        assert one.digest in found.stdout
    assert "has no tar-split" in found.stdout
