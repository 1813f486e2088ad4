"""Local images as skopeo, podman and umoci really write them, against the same images of a registry."""

from __future__ import annotations

import gzip
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, Limits
from guestpull_server.models import ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry import ImageSource, RegistryClient, fetch_image, open_source
from support.images import files, image, index, layer
from support.peers import DockerRegistry, run, skopeo_copy

AMD64 = Platform("linux", "amd64")
BASE = layer(*files("base", count=20))
TOP = layer(*files("top", count=20))
SHOP = image(BASE, TOP, process={"Cmd": ["/bin/sh"]})
BOTH = index(SHOP, image(BASE, platform="linux/arm64/v8"))


@contextmanager
def opened(text: str, scratch: Path) -> Iterator[ImageSource]:
    client = RegistryClient(Configuration())
    with open_source(text, client, None, Limits(), str(scratch), Cancellation("bake")) as source:
        yield source
    client.close()


def resolve(source: ImageSource, platform: Platform = AMD64) -> ResolvedImage:
    return fetch_image(source, platform, Cancellation("bake"))


def read_all(source: ImageSource, resolved: ResolvedImage) -> list[bytes]:
    """All layers; reading one to its end proves it."""
    contents: list[bytes] = []
    for one in resolved.layers:
        with source.open_blob(one.blob, Cancellation("bake")) as stream:
            contents.append(b"")
            while piece := stream.read(1 << 20):
                contents[-1] += piece
    return contents


@pytest.fixture
def podman() -> Iterator[Callable[..., None]]:
    """Podman with a store of its own; its paths must be short."""
    with tempfile.TemporaryDirectory(prefix="podman") as directory:
        where = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs"]

        def run_podman(*arguments: str) -> None:
            run("podman", *where, *arguments)

        yield run_podman


@pytest.fixture(scope="module")
def shop(docker_registry: DockerRegistry) -> str:
    return docker_registry.push("local/shop", "1.0", BOTH)


def test_skopeos_layout_is_the_registrys_image(shop: str, tmp_path: Path) -> None:
    skopeo_copy(f"docker://{shop}", f"oci:{tmp_path}/layout:1.0")
    with opened(f"oci:{tmp_path}/layout:1.0", tmp_path) as source:
        resolved = resolve(source)
        assert (resolved.manifest_digest, resolved.image_id) == (SHOP.digest, SHOP.image_id)
        assert read_all(source, resolved) == [BASE.blob, TOP.blob]


def test_skopeos_layout_of_all_platforms_has_each(shop: str, tmp_path: Path) -> None:
    skopeo_copy(f"docker://{shop}", f"oci:{tmp_path}/layout:1.0", "--all")
    with opened(f"oci:{tmp_path}/layout", tmp_path) as source:
        assert resolve(source).manifest_digest == SHOP.digest
        assert resolve(source, Platform.parse("linux/arm64")).manifest_digest == BOTH.images[1].digest


def test_umocis_layout_is_read(shop: str, tmp_path: Path) -> None:
    skopeo_copy(f"docker://{shop}", f"oci:{tmp_path}/layout:1.0")
    run(
        "umoci",
        "config",
        "--image",
        f"{tmp_path}/layout:1.0",
        "--tag",
        "changed",
        "--config.cmd",
        "/bin/true",
    )
    with opened(f"oci:{tmp_path}/layout:changed", tmp_path) as source:
        resolved = resolve(source)
        assert json.loads(resolved.config)["config"]["Cmd"] == ["/bin/true"]
        assert read_all(source, resolved) == [BASE.blob, TOP.blob]


@pytest.mark.parametrize("compressed", [False, True])
def test_skopeos_oci_archive_is_the_registrys_image(shop: str, tmp_path: Path, compressed: bool) -> None:
    archive = tmp_path / "shop.tar"
    skopeo_copy(f"docker://{shop}", f"oci-archive:{archive}:quay.io/org/shop:1.0")
    if compressed:
        archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    with opened(f"oci-archive:{archive}", tmp_path) as source:
        resolved = resolve(source)
        assert resolved.reference == "quay.io/org/shop:1.0"
        assert (resolved.manifest_digest, resolved.image_id) == (SHOP.digest, SHOP.image_id)
        assert read_all(source, resolved) == [BASE.blob, TOP.blob]


@pytest.mark.parametrize("compressed", [False, True])
def test_skopeos_docker_archive_has_the_same_layers_unpacked(
    shop: str, tmp_path: Path, compressed: bool
) -> None:
    archive = tmp_path / "shop.tar"
    skopeo_copy(f"docker://{shop}", f"docker-archive:{archive}:quay.io/org/shop:1.0")
    if compressed:
        archive.write_bytes(gzip.compress(archive.read_bytes(), 1))
    with opened(f"docker-archive:{archive}", tmp_path) as source:
        resolved = resolve(source)
        assert resolved.reference == "quay.io/org/shop:1.0"
        assert json.loads(resolved.config)["config"]["Cmd"] == ["/bin/sh"]
        assert [one.diff_id for one in resolved.layers] == SHOP.diff_ids
        assert read_all(source, resolved) == [BASE.tar, TOP.tar]


@pytest.mark.parametrize("archive_format", ["docker-archive", "oci-archive"])
def test_podmans_archive_is_read(
    shop: str, tmp_path: Path, podman: Callable[..., None], archive_format: str
) -> None:
    podman("pull", "--quiet", "--tls-verify=false", shop)
    podman("tag", shop, "quay.io/org/shop:1.0", "quay.io/org/shop:2.0")
    archive = tmp_path / "shop.tar"
    podman("save", "--quiet", f"--format={archive_format}", f"--output={archive}", "quay.io/org/shop:2.0")
    with opened(f"{archive_format}:{tmp_path}/shop.tar", tmp_path) as source:
        resolved = resolve(source)
        assert resolved.reference == "quay.io/org/shop:2.0"
        assert [one.diff_id for one in resolved.layers] == SHOP.diff_ids
        assert len(read_all(source, resolved)) == 2


def test_several_images_in_podmans_archive_are_told_apart(
    docker_registry: DockerRegistry, shop: str, tmp_path: Path, podman: Callable[..., None]
) -> None:
    other = docker_registry.push("local/other", "1.0", image(BASE))
    for one in (shop, other):
        podman("pull", "--quiet", "--tls-verify=false", one)
    podman("save", "--quiet", "--multi-image-archive", f"--output={tmp_path}/both.tar", shop, other)
    for reference, diff_ids in ((shop, SHOP.diff_ids), (other, [BASE.diff_id])):
        with opened(f"docker-archive:{tmp_path}/both.tar:{reference}", tmp_path) as source:
            resolved = resolve(source)
            assert resolved.reference == reference
            assert [one.diff_id for one in resolved.layers] == diff_ids


def test_an_archive_with_both_lists_can_be_read_by_either(shop: str, tmp_path: Path) -> None:
    """Docker 25 and later write an OCI layout with a manifest.json beside its index.json."""
    skopeo_copy(f"docker://{shop}", f"oci:{tmp_path}/layout:1.0")
    blobs = "blobs/sha256/"
    manifest = {
        "Config": blobs + SHOP.image_id.removeprefix("sha256:"),
        "RepoTags": ["shop:1.0"],
        "Layers": [blobs + one.digest.removeprefix("sha256:") for one in SHOP.layers],
    }
    (tmp_path / "layout/manifest.json").write_text(json.dumps([manifest]))
    with tarfile.open(tmp_path / "shop.tar", "w") as tar:
        tar.add(tmp_path / "layout", ".")
    for kind in ("oci-archive", "docker-archive"):
        with opened(f"{kind}:{tmp_path}/shop.tar", tmp_path) as source:
            resolved = resolve(source)
            assert resolved.image_id == SHOP.image_id
            assert read_all(source, resolved) == [BASE.blob, TOP.blob]


def test_a_compressed_archive_is_inflated_where_it_is_told_to(shop: str, tmp_path: Path) -> None:
    archive = tmp_path / "shop.tar"
    skopeo_copy(f"docker://{shop}", f"oci-archive:{archive}")
    run("gzip", "-1", str(archive))
    with opened(f"oci-archive:{archive}.gz", tmp_path) as source:
        assert resolve(source).image_id == SHOP.image_id
        assert [path.name for path in tmp_path.iterdir()] == ["shop.tar.gz"]
