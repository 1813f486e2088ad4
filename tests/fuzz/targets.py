"""The targets of fuzzing: the code, its valid inputs, and how to damage them.

A target's `run` returns or raises one of its allowed errors; any other exception is a failure.
"""

from __future__ import annotations

import atexit
import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import zstandard

from fuzz import mutation
from fuzz.mutation import Mutate
from guestpull_server.config import Limits
from guestpull_server.errors import GuestpullError, WorkerFailed
from guestpull_server.layer import LayerWorkers, verify_layer
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.models import Digest, KiB, MiB
from guestpull_server.registry import Reference
from guestpull_server.registry.challenges import parse_challenges
from guestpull_server.registry.manifests import Document, read, read_config
from guestpull_server.store.entries import Unreadable
from guestpull_server.store.meta_store import MetaStore
from support import images, reading
from support.trees import differences, tree

_DIGEST = Digest("sha256:" + "0" * 64)
_SMALL = Limits(
    max_layer_bytes=8 * MiB, max_layer_entries=2_000, max_header_bytes=64 * KiB, max_zstd_window_bytes=8 * MiB
)


@dataclass(frozen=True)
class Target:
    """A parser of untrusted data."""

    name: str
    corpus: Callable[[], Sequence[bytes]]
    mutate: Mutate
    run: Callable[[bytes], None]
    needs_root: bool = False


# -- layers -------------------------------------------------------------------------------------------------


@cache
def _tars() -> Sequence[bytes]:
    entries: list[images.Entry | images.RawTar] = [
        images.directory("d", mode=0o2775, gid=7),
        images.file("d/f", b"f" * 700, pax={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}),
        images.symlink("s", "d"),
        images.file("s/g", b"through a link"),
        images.hardlink("h", "d/f"),
        images.whiteout("d/gone"),
        images.opaque("o"),
        images.device("n", "char", 1, 3),
        images.fifo("p"),
        images.file("x" * 150, b"long"),
        images.symlink("l", "y" * 150),
        images.file("big", b"b" * 5000, uid=3_000_000_000),
        images.sparse_file("sparse", {0: b"01234", 10: b"56789"}, 20),
    ]
    return (images.tar_of(entries), images.tar_of(entries, tar_format=1), images.tar_of(entries[:4]))


def _run_tar(tar: bytes) -> None:
    with suppress(TarError, LayerLimitExceeded):
        reading.members(tar, piece=512 + len(tar) % 4096, max_header_bytes=64 * KiB)


@cache
def _streams() -> Sequence[bytes]:
    tar = _tars()[0]
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(tar)
    return (
        gzip.compress(tar),
        gzip.compress(tar[:700]) + gzip.compress(tar[700:]),
        gzip.compress(os.urandom(100) * 500, 0),
        frame + frame,
        b"\x5a\x2a\x4d\x18\x04\0\0\0skip" + frame,
        zstandard.ZstdCompressor(level=19).compress(bytes(300_000)),
    )


def _run_inflate(stream: bytes) -> None:
    with suppress(TarError, LayerLimitExceeded):
        reading.inflate(stream, _SMALL)


@cache
def _workers() -> LayerWorkers:
    return LayerWorkers(_SMALL)


def _run_layer(tar: bytes) -> None:
    """Unpack beside a canary, which must not change, and verify the unpacked layer."""
    with _scratch() as top:
        (top / "f").write_bytes(b"canary")
        (top / "d").mkdir()
        before = {path: node for path, node in tree(top).items() if path}
        (top / "layer").mkdir(mode=0o755)
        directory, tar_split = str(top / "layer"), str(top / "tar-split")
        try:
            with _workers().unpack(directory, "sha256", _DIGEST, tar_split_path=tar_split) as worker:
                worker.write(memoryview(tar))
                unpacked = worker.finish()
            assert verify_layer(directory, tar_split, unpacked.diff_id, limits=_SMALL) == ()
        except WorkerFailed:
            raise AssertionError("the worker died") from None
        except GuestpullError:
            pass
        shutil.rmtree(directory)
        Path(tar_split).unlink()
        after = {path: node for path, node in tree(top).items() if path}
        assert differences(after, before) == []


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@cache
def _proved() -> tuple[str, Digest, bytes]:
    """A layer's directory, its diff_id, and its tar-split."""
    scratch = ExitStack()
    atexit.register(scratch.close)
    top = scratch.enter_context(_scratch())
    (top / "layer").mkdir()
    with _workers().unpack(
        str(top / "layer"), "sha256", _DIGEST, tar_split_path=str(top / "tar-split")
    ) as worker:
        worker.write(memoryview(_tars()[0]))
        unpacked = worker.finish()
    return str(top / "layer"), unpacked.diff_id, (top / "tar-split").read_bytes()


def _run_tar_split(tar_split: bytes) -> None:
    directory, diff_id, _ = _proved()
    with _scratch() as top:
        (top / "tar-split").write_bytes(tar_split)
        for change in verify_layer(directory, str(top / "tar-split"), diff_id, limits=_SMALL):
            str(change)


# -- registries ---------------------------------------------------------------------------------------------


def _references() -> Sequence[bytes]:
    return (
        b"busybox",
        b"quay.io/org/img:1.0",
        b"localhost:5000/a/b/c@sha256:" + b"0" * 64,
        b"[::1]:5000/x:tag@sha256:" + b"f" * 64,
        b"docker.io/library/busybox:latest",
    )


def _run_reference(text: bytes) -> None:
    with suppress(GuestpullError):
        reference = Reference.parse(text.decode(errors="surrogateescape"))
        assert Reference.parse(str(reference)) == reference


@cache
def _manifests() -> Sequence[bytes]:
    one = images.image(images.layer(images.file("f")), process={"Cmd": ["sh"]})
    other = images.image(images.layer(images.file("g")), docker=True, platform="linux/arm64/v8")
    return (one.manifest, other.manifest, images.index(one, other).manifest)


def _run_manifest(content: bytes) -> None:
    with suppress(GuestpullError):
        read(Document("example.org/img:1", _DIGEST, content, images.OCI_MANIFEST), 500)


@cache
def _configs() -> Sequence[bytes]:
    process: dict[str, images.Json] = {
        "User": "a:b",
        "Env": ["A=b"],
        "Entrypoint": ["/x"],
        "Cmd": None,
        "Volumes": {"/v": {}},
        "ExposedPorts": {"80/tcp": {}},
        "Labels": {"a": "b"},
        "WorkingDir": "/w",
    }
    return (images.image(images.layer(images.file("f")), process=process).config,)


def _run_config(content: bytes) -> None:
    with suppress(GuestpullError):
        config = read_config("example.org/img:1", _DIGEST, content)
        str(config.platform)


def _challenges() -> Sequence[bytes]:
    return (
        b'Bearer realm="https://auth.example.org/token",service="registry",scope="repository:a/b:pull"',
        b'Basic realm="a \\"quoted\\" realm", Bearer realm=x',
        b"Negotiate, Basic",
    )


def _run_challenge(header: bytes) -> None:
    parse_challenges([header.decode("latin-1")])


# -- the store ----------------------------------------------------------------------------------------------


@cache
def _meta_stores() -> Sequence[bytes]:
    digest, other = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    layer = (
        f'{{"decoder":"Gzip","encrypted":false,"compressed_digest":"{digest}","uncompressed_digest":"{other}",'
        f'"store_path":"/run/image/layers/sha256_{"a" * 64}"}}'
    )
    config = '{\\"architecture\\":\\"amd64\\"}'
    text = (
        f'{{"image_db":{{"{other}":{{"id":"{other}","digest":"{digest}","reference":"docker.io/library/a:1",'
        f'"image_config":{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{other}"]}}}},'
        f'"signed":false,"layer_metas":[{layer}],"note":"{config}"}}}},'
        f'"layer_db":{{"{digest}":{layer}}},"snapshot_db":{{"a":1}},"unknown":[1]}}'
    )
    return (text.encode(), b'{"image_db":{},"layer_db":{},"snapshot_db":{}}')


def _run_meta_store(content: bytes) -> None:
    with suppress(Unreadable):
        encoded = MetaStore.decode(content).encode()
        MetaStore.decode(encoded)


TARGETS = (
    Target("tar", _tars, mutation.tar_of, _run_tar),
    Target("inflate", _streams, mutation.bytes_of, _run_inflate),
    Target("layer", _tars, mutation.tar_of, _run_layer, needs_root=True),
    Target("tar-split", lambda: (_proved()[2],), mutation.bytes_of, _run_tar_split, needs_root=True),
    Target("reference", _references, mutation.bytes_of, _run_reference),
    Target("manifest", _manifests, mutation.json_of, _run_manifest),
    Target("config", _configs, mutation.json_of, _run_config),
    Target("challenge", _challenges, mutation.bytes_of, _run_challenge),
    Target("meta-store", _meta_stores, mutation.json_of, _run_meta_store),
)
