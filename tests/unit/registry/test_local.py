"""Images in files: OCI layouts and docker archives, honest and hostile."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    BlobNotFound,
    Cancelled,
    DigestMismatch,
    GuestpullError,
    ImageNotFound,
    InvalidManifest,
    InvalidRequest,
    LimitExceeded,
    NoMatchingPlatform,
    SizeMismatch,
)
from guestpull_server.models import ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry import ImageSource, RegistryClient, fetch_image, is_local, open_source
from guestpull_server.registry.local.archive import Archive
from support.images import Json, file, files, image, index, layer, layer_of_tar, tar_of
from support.local_images import (
    archived,
    blob_path,
    docker_save,
    entry_named,
    layout_of,
    write_layout,
    write_tree,
)
from support.pulling import AMD64, descriptor_of, read_blob

BASE = layer(*files("base", count=10))
TOP = layer(*files("top", count=10), compression="zstd")
PLAIN = layer(file("plain"), compression="none")
SHOP = image(BASE, TOP, PLAIN)
ARM = image(BASE, platform="linux/arm64/v8")
OTHER = image(TOP)

Open: TypeAlias = Callable[..., ImageSource]


@pytest.fixture
def open_image(tmp_path: Path, client: RegistryClient) -> Iterator[Open]:
    """Open a local source until the test's end."""
    with ExitStack() as closing:

        def open_it(text: str, limits: Limits | None = None) -> ImageSource:
            scratch = tmp_path / "scratch"
            scratch.mkdir(exist_ok=True)
            source = open_source(text, client, None, limits or Limits(), str(scratch), Cancellation("bake"))
            return closing.enter_context(source)

        yield open_it


def resolve(source: ImageSource, platform: Platform = AMD64) -> ResolvedImage:
    return fetch_image(source, platform, Cancellation("bake"))


# -- OCI layouts -------------------------------------------------------------------------------------------


@pytest.fixture(params=["oci", "oci-archive", "oci-archive+gzip", "oci-archive+zstd", "oci-archive./"])
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, bytes]], str]:
    """Write a layout in one of its forms; returns the text that names it."""

    def write(tree: dict[str, bytes]) -> str:
        if request.param == "oci":
            return f"oci:{write_tree(tmp_path / 'layout', tree)}"
        tar = archived(tree, prefix="./" if request.param.endswith("./") else "")
        if request.param.endswith("+gzip"):
            tar = gzip.compress(tar, compresslevel=1)
        if request.param.endswith("+zstd"):
            tar = zstandard.compress(tar, 1)
        (tmp_path / "layout.tar").write_bytes(tar)
        return f"oci-archive:{tmp_path}/layout.tar"

    return write


def test_a_layout_has_the_image_that_was_pushed(
    layout: Callable[[dict[str, bytes]], str], open_image: Open
) -> None:
    source = open_image(layout(layout_of({"": SHOP})))
    resolved = resolve(source)

    assert resolved.manifest_digest == SHOP.digest
    assert resolved.image_id == SHOP.image_id
    assert resolved.config == SHOP.config
    assert [one.diff_id for one in resolved.layers] == SHOP.diff_ids
    assert [read_blob(source, one) for one in SHOP.layers] == [one.blob for one in SHOP.layers]


def test_a_tag_names_the_image(layout: Callable[[dict[str, bytes]], str], open_image: Open) -> None:
    text = layout(layout_of({"1.0": SHOP, "2.0": OTHER}))
    assert resolve(open_image(f"{text}:2.0")).image_id == OTHER.image_id


def test_several_images_want_a_tag(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"1.0": SHOP, "2.0": OTHER})
    with pytest.raises(InvalidRequest, match=r"1\.0, 2\.0"):
        open_image(f"oci:{tmp_path}")


def test_one_image_under_several_platforms_is_one_image(tmp_path: Path, open_image: Open) -> None:
    write_tree(tmp_path, layout_of({"a": SHOP, "b": ARM}, entries=[entry_named(SHOP), entry_named(ARM)]))
    assert resolve(open_image(f"oci:{tmp_path}"), Platform.parse("linux/arm64")).image_id == ARM.image_id


def test_a_layout_may_have_an_index(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"1.0": index(SHOP, ARM)})
    source = open_image(f"oci:{tmp_path}:1.0")
    assert resolve(source).manifest_digest == SHOP.digest
    with pytest.raises(NoMatchingPlatform, match="linux/amd64, linux/arm64/v8"):
        resolve(source, Platform.parse("linux/s390x"))


def test_a_tag_that_is_not_there_is_not_found(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"1.0": SHOP})
    with pytest.raises(ImageNotFound, match=r"no tag 2\.0.*it contains 1\.0") as caught:
        open_image(f"oci:{tmp_path}:2.0")
    assert "credentials" not in str(caught.value)


def test_an_empty_layout_has_no_image(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {})
    with pytest.raises(ImageNotFound, match="no images"):
        open_image(f"oci:{tmp_path}")


@pytest.mark.parametrize(
    ("annotations", "reference"),
    [
        ({}, ""),
        ({"org.opencontainers.image.ref.name": "1.0"}, ""),
        ({"org.opencontainers.image.ref.name": "quay.io/shop:1.0"}, "quay.io/shop:1.0"),
        ({"org.opencontainers.image.ref.name": "shop:1.0"}, "docker.io/library/shop:1.0"),
        ({"org.opencontainers.image.ref.name": "not a/reference:"}, ""),
        (
            {
                "org.opencontainers.image.ref.name": "1.0",
                "io.containerd.image.name": "docker.io/library/shop:1.0",
            },
            "docker.io/library/shop:1.0",
        ),
    ],
)
def test_a_full_name_in_the_layout_is_the_reference(
    tmp_path: Path, open_image: Open, annotations: dict[str, str], reference: str
) -> None:
    write_tree(tmp_path, layout_of({"": SHOP}, entries=[entry_named(SHOP, **annotations)]))
    source = open_image(f"oci:{tmp_path}")
    assert source.reference == resolve(source).reference == reference


def test_a_full_name_is_found_by_a_short_one(tmp_path: Path, open_image: Open) -> None:
    entry = entry_named(SHOP, **{"io.containerd.image.name": "docker.io/library/shop:latest"})
    write_tree(tmp_path, layout_of({"": SHOP}, entries=[entry]))
    assert resolve(open_image(f"oci:{tmp_path}:docker.io/library/shop:latest")).image_id == SHOP.image_id


def test_the_manifest_of_a_layout_is_found_without_reading_it(tmp_path: Path, open_image: Open) -> None:
    tree = layout_of({"": SHOP})
    del tree[blob_path(SHOP.digest)]
    write_tree(tmp_path, tree)
    source = open_image(f"oci:{tmp_path}")
    assert source.manifest(AMD64, Cancellation("bake")).digest == SHOP.digest


# -- docker archives ---------------------------------------------------------------------------------------


def docker_archive(tmp_path: Path, tar: bytes) -> str:
    (tmp_path / "saved.tar").write_bytes(tar)
    return f"docker-archive:{tmp_path}/saved.tar"


@pytest.mark.parametrize("compress", [lambda tar: tar, gzip.compress, zstandard.compress])
def test_a_docker_archive_has_the_image(
    tmp_path: Path, open_image: Open, compress: Callable[[bytes], bytes]
) -> None:
    source = open_image(docker_archive(tmp_path, compress(archived(docker_save({"shop:1.0": SHOP})))))
    resolved = resolve(source)

    assert resolved.reference == source.reference == "docker.io/library/shop:1.0"
    assert resolved.image_id == SHOP.image_id
    assert resolved.config == SHOP.config
    assert [one.diff_id for one in resolved.layers] == SHOP.diff_ids
    assert [one.blob.digest for one in resolved.layers] == SHOP.diff_ids
    uncompressed = [layer_of_tar(one.tar, compression="none") for one in SHOP.layers]
    assert [read_blob(source, one) for one in uncompressed] == [one.tar for one in SHOP.layers]


def test_compressed_layers_keep_the_digests_that_they_were_pushed_with(
    tmp_path: Path, open_image: Open
) -> None:
    source = open_image(docker_archive(tmp_path, archived(docker_save({"shop:1.0": SHOP}, compressed=True))))
    resolved = resolve(source)

    assert [one.blob.digest for one in resolved.layers] == [one.digest for one in SHOP.layers]
    assert [read_blob(source, one) for one in SHOP.layers] == [one.blob for one in SHOP.layers]


def test_a_compressed_layer_under_whatever_name_has_the_digest_of_its_bytes(
    tmp_path: Path, open_image: Open
) -> None:
    tree = docker_save({"shop": ARM})
    [path] = [path for path in tree if path.endswith("layer.tar")]
    tree[path] = BASE.blob
    source = open_image(docker_archive(tmp_path, archived(tree)))

    assert resolve(source, Platform.parse("linux/arm64")).layers[0].blob.digest == BASE.digest
    assert read_blob(source, BASE) == BASE.blob


def test_layers_may_be_links_to_others(tmp_path: Path, open_image: Open) -> None:
    tree = docker_save({"shop": image(BASE)})
    [manifest] = json.loads(tree["manifest.json"])
    links = {"abc/layer.tar": f"../{manifest['Layers'][0]}"}
    manifest["Layers"] = ["abc/layer.tar"]
    tree["manifest.json"] = json.dumps([manifest]).encode()

    source = open_image(docker_archive(tmp_path, archived(tree, links=links)))
    assert resolve(source).layers[0].diff_id == BASE.diff_id
    assert read_blob(source, layer_of_tar(BASE.tar, compression="none")) == BASE.tar


def test_the_same_archive_has_the_same_manifest_digest(tmp_path: Path, open_image: Open) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"shop": SHOP})))
    assert resolve(open_image(text)).manifest_digest == resolve(open_image(text)).manifest_digest


@pytest.mark.parametrize("wanted", ["shop:2.0", "docker.io/library/shop:2.0", "@1"])
def test_one_of_several_images_is_named(tmp_path: Path, open_image: Open, wanted: str) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"shop:1.0": SHOP, "shop:2.0": OTHER})))
    assert resolve(open_image(f"{text}:{wanted}")).image_id == OTHER.image_id


def test_several_saved_images_want_a_name(tmp_path: Path, open_image: Open) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"shop:1.0": SHOP, "shop:2.0": OTHER})))
    with pytest.raises(InvalidRequest, match=r"docker.io/library/shop:1\.0, docker.io/library/shop:2\.0"):
        open_image(text)


@pytest.mark.parametrize("wanted", ["shop:3.0", "@2", "@x"])
def test_a_name_that_was_not_saved_is_not_found(tmp_path: Path, open_image: Open, wanted: str) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"shop:1.0": SHOP})))
    with pytest.raises(ImageNotFound, match=r"it contains docker\.io/library/shop:1\.0") as caught:
        open_image(f"{text}:{wanted}")
    assert "credentials" not in str(caught.value)


def test_an_image_that_was_saved_without_a_name_has_none(tmp_path: Path, open_image: Open) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"-": SHOP})))
    assert resolve(open_image(text)).reference == ""


def test_a_saved_image_for_another_platform_is_refused(tmp_path: Path, open_image: Open) -> None:
    text = docker_archive(tmp_path, archived(docker_save({"shop": ARM})))
    with pytest.raises(NoMatchingPlatform):
        resolve(open_image(text))


# -- references --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["quay.io/shop:1.0", "docker://quay.io/shop:1.0"])
def test_a_reference_is_an_image_of_a_registry(open_image: Open, text: str) -> None:
    assert open_image(text).reference == "quay.io/shop:1.0"


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("oci:x", True),
        ("oci-archive:x", True),
        ("docker-archive:x", True),
        ("oci/x", False),
        ("docker://x", False),
    ],
)
def test_what_is_local(text: str, local: bool) -> None:
    assert is_local(text) is local


# -- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_a_file_that_is_not_there_is_named(open_image: Open, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="/nonexistent/x"):
        open_image(f"{kind}:/nonexistent/x")


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_a_path_that_no_file_can_have_is_refused(open_image: Open, kind: str) -> None:
    with pytest.raises(InvalidRequest, match="/x"):
        open_image(f"{kind}:/x\0y")


def test_a_pipe_is_no_archive(tmp_path: Path, open_image: Open) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequest, match="not a regular file"):
        open_image(f"oci-archive:{tmp_path}/pipe")


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_a_file_that_the_kernel_does_not_let_us_read_is_no_archive(open_image: Open, kind: str) -> None:
    # it says that it is a regular file
    with pytest.raises(InvalidRequest, match="/proc/self/mem: Input/output error"):
        open_image(f"{kind}:/proc/self/mem")


def test_a_pipe_is_no_blob(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"": SHOP})
    (tmp_path / blob_path(SHOP.image_id)).unlink()
    os.mkfifo(tmp_path / blob_path(SHOP.image_id))
    with pytest.raises(BlobNotFound):
        resolve(open_image(f"oci:{tmp_path}"))


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_another_archive_is_no_image(tmp_path: Path, open_image: Open, kind: str) -> None:
    (tmp_path / "x.tar").write_bytes(archived({"readme": b""}))
    with pytest.raises(InvalidManifest, match="file not found"):
        open_image(f"{kind}:{tmp_path}/x.tar")


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"x" * 2000, b"\x1f\x8b broken", b"\x28\xb5\x2f\xfd broken"]
)
def test_no_archive_is_refused_by_name(tmp_path: Path, open_image: Open, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InvalidManifest):
        open_image(f"docker-archive:{tmp_path}/x.tar")


@pytest.mark.parametrize("content", [b"BZh9", b"\xfd7zXZ\x00"])
def test_what_only_begins_as_if_it_were_compressed_is_refused(
    tmp_path: Path, open_image: Open, content: bytes
) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InvalidManifest, match="decompression failed"):
        open_image(f"docker-archive:{tmp_path}/x.tar")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, lzma.compress, bz2.compress])
def test_a_compressed_archive_has_the_image(
    tmp_path: Path, open_image: Open, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "x.tar").write_bytes(compress(archived(layout_of({"": SHOP}))))
    assert resolve(open_image(f"oci-archive:{tmp_path}/x.tar")).manifest_digest == SHOP.digest


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
@pytest.mark.parametrize("between", [b"", bytes(8)])
def test_an_archive_may_be_of_several_streams(
    tmp_path: Path, open_image: Open, compress: Callable[[bytes], bytes], between: bytes
) -> None:
    whole = archived(layout_of({"": SHOP}))
    parts = [compress(whole[:1000]), compress(b""), compress(whole[1000:])]
    (tmp_path / "x.tar").write_bytes(between.join(parts) + between)
    assert resolve(open_image(f"oci-archive:{tmp_path}/x.tar")).manifest_digest == SHOP.digest


def test_an_archive_that_takes_too_much_memory_is_refused(tmp_path: Path, open_image: Open) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    writer = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=filters)
    content = writer.compress(archived(layout_of({"": SHOP}))) + writer.flush()
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InvalidManifest, match="decompression failed"):
        open_image(f"oci-archive:{tmp_path}/x.tar")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, lzma.compress, bz2.compress])
def test_a_truncated_archive_is_refused(
    tmp_path: Path, open_image: Open, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(archived(layout_of({"": SHOP})))
    (tmp_path / "x.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidManifest):
        open_image(f"oci-archive:{tmp_path}/x.tar")


def test_what_an_archive_inflates_to_is_bounded(tmp_path: Path, open_image: Open) -> None:
    (tmp_path / "x.tar").write_bytes(gzip.compress(archived({"zeros": bytes(3_000_000)})))
    limits = msgspec.structs.replace(Limits(), max_layer_bytes=2_000_000)
    with pytest.raises(LimitExceeded, match="max_layer_bytes"):
        open_image(f"oci-archive:{tmp_path}/x.tar", limits)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("compress", [zstandard.compress, lzma.compress, bz2.compress])
def test_an_archives_compression_is_bounded(
    tmp_path: Path, open_image: Open, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "x.tar").write_bytes(compress(archived({"zeros": bytes(3_000_000)})))
    limits = msgspec.structs.replace(Limits(), max_compression_ratio=100)
    with pytest.raises(LimitExceeded, match="max_compression_ratio"):
        open_image(f"oci-archive:{tmp_path}/x.tar", limits)


def test_a_compressed_archive_leaves_no_file_behind(tmp_path: Path, open_image: Open) -> None:
    (tmp_path / "x.tar").write_bytes(gzip.compress(archived(layout_of({"": SHOP}))))
    resolve(open_image(f"oci-archive:{tmp_path}/x.tar"))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("what", ["index.json", "manifest.json"])
def test_the_list_of_images_is_bounded(tmp_path: Path, open_image: Open, what: str) -> None:
    kind = {"index.json": "oci-archive", "manifest.json": "docker-archive"}[what]
    (tmp_path / "x.tar").write_bytes(archived({what: bytes(5_000_000)}))
    with pytest.raises(LimitExceeded, match="max_manifest_bytes"):
        open_image(f"{kind}:{tmp_path}/x.tar")


def spoiled(path: str, content: bytes) -> dict[str, bytes]:
    return layout_of({"": SHOP}) | {path: content}


@pytest.mark.parametrize(
    ("path", "content", "error"),
    [
        (blob_path(SHOP.digest), SHOP.manifest + b" ", DigestMismatch),
        (blob_path(SHOP.image_id), SHOP.config + b" ", SizeMismatch),
        (blob_path(SHOP.image_id), SHOP.config.replace(b"linux", b"LINUX"), DigestMismatch),
        ("index.json", b"{", InvalidManifest),
        ("index.json", SHOP.manifest, InvalidManifest),
        ("index.json", b'{"manifests": [{"digest": "sha256:../../etc/passwd", "size": 1}]}', InvalidManifest),
    ],
)
def test_an_altered_layout_is_found_out(
    tmp_path: Path, open_image: Open, path: str, content: bytes, error: type[GuestpullError]
) -> None:
    write_tree(tmp_path, spoiled(path, content))
    with pytest.raises(error):
        resolve(open_image(f"oci:{tmp_path}"))


@pytest.mark.parametrize(
    ("content", "error"), [(BASE.blob[:-1] + b"!", DigestMismatch), (BASE.blob[:-1], SizeMismatch)]
)
def test_an_altered_blob_is_found_out(
    tmp_path: Path, open_image: Open, content: bytes, error: type[GuestpullError]
) -> None:
    write_tree(tmp_path, spoiled(blob_path(BASE.digest), content))
    source = open_image(f"oci:{tmp_path}")
    resolve(source)
    with pytest.raises(error):
        read_blob(source, BASE)


def test_a_missing_blob_is_named(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"": SHOP})
    (tmp_path / blob_path(BASE.digest)).unlink()
    with pytest.raises(BlobNotFound, match=BASE.digest):
        read_blob(open_image(f"oci:{tmp_path}"), BASE)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"Layers": []}, InvalidManifest),
        ({"Layers": ["../../../etc/passwd", "/etc/passwd", "x"]}, InvalidManifest),
        ({"Config": "/etc/passwd"}, InvalidManifest),
        ({"Config": 1}, InvalidManifest),
        ({"Config": "0" * 64 + ".json"}, DigestMismatch),
    ],
)
def test_a_manifest_json_that_lies_is_found_out(
    tmp_path: Path, open_image: Open, change: dict[str, Json], error: type[GuestpullError]
) -> None:
    tree = docker_save({"shop": SHOP}) | {"0" * 64 + ".json": SHOP.config}
    [manifest] = json.loads(tree["manifest.json"])
    tree["manifest.json"] = json.dumps([manifest | change]).encode()
    with pytest.raises(error):
        resolve(open_image(docker_archive(tmp_path, archived(tree))))


def test_an_altered_layer_of_a_docker_archive_is_found_out(tmp_path: Path, open_image: Open) -> None:
    plain = layer_of_tar(BASE.tar, compression="none")
    tree = docker_save({"shop": image(plain)})
    [path] = [path for path in tree if path.endswith("layer.tar")]
    tree[path] = plain.tar[:-1] + b"!"
    source = open_image(docker_archive(tmp_path, archived(tree)))
    resolve(source)
    with pytest.raises(DigestMismatch):
        read_blob(source, plain)


def test_links_that_lead_in_a_circle_lead_nowhere(tmp_path: Path, open_image: Open) -> None:
    (tmp_path / "x.tar").write_bytes(archived({}, links={"index.json": "b", "b": "index.json"}))
    with pytest.raises(InvalidManifest, match="file not found"):
        open_image(f"oci-archive:{tmp_path}/x.tar")


def test_links_do_not_lead_out_of_the_archive(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"": SHOP})
    (tmp_path / "x.tar").write_bytes(archived({}, links={"index.json": f"{tmp_path}/index.json"}))
    with pytest.raises(InvalidManifest, match="file not found"):
        open_image(f"oci-archive:{tmp_path}/x.tar")


def test_a_cancelled_reader_is_told_so(tmp_path: Path, open_image: Open) -> None:
    write_layout(tmp_path, {"": SHOP})
    gone = Cancellation("bake")
    with open_image(f"oci:{tmp_path}").open_blob(descriptor_of(BASE), gone) as stream:
        assert len(stream.read(10)) == 10
        gone.cancel()
        with pytest.raises(Cancelled):
            stream.read(10)


# -- for all -----------------------------------------------------------------------------------------------


def header(**fields: bytes | str | int) -> bytes:
    entry = tarfile.TarInfo("index.json")
    for name, value in fields.items():
        setattr(entry, name, value)
    return entry.tobuf(tarfile.GNU_FORMAT)


HOSTILE_TARS = [
    header(size=-512),
    header(size=1 << 62),
    header(type=b"x", size=1 << 40) + bytes(1024),
    header(type=b"L", size=1 << 40) + bytes(1024),
    header(type=b"S"),
    header(type=b"S")[:482] + b"\1" + header(type=b"S")[483:],
    header(type=b"x", size=20) + b"20 size=-1000000000\n".ljust(512, b"\0") + header(),
    b"".join(header(type=b"x", size=0) for _ in range(3000)),
    tar_of([file("a", pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"})]),
]


def open_tar(directory: Path, content: bytes) -> None:
    path = directory / "x.tar"
    path.write_bytes(content)
    try:
        with Archive.open(str(path), "x", Limits(), str(directory), Cancellation("bake")) as archive:
            archive.find("index.json")
    except GuestpullError:
        pass


@pytest.mark.parametrize("content", HOSTILE_TARS)
def test_a_hostile_tar_is_read_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    open_tar(tmp_path, content)


@given(
    st.sampled_from([archived(layout_of({"": image(PLAIN)})), *HOSTILE_TARS]),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
)
def test_any_damage_to_a_tar_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, tar: bytes, damage: list[tuple[int, int]]
) -> None:
    damaged = bytearray(tar)
    for position, value in damage:
        if position < len(damaged):
            damaged[position] = value
    for start in range(0, min(len(damaged) - 511, 5000), 512):
        block = damaged[start : start + 512]
        if block[257:262] == b"ustar":  # a header whose checksum is wrong would be looked at no further
            block[148:156] = b" " * 8
            damaged[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    open_tar(tmp_path_factory.getbasetemp(), bytes(damaged))
