"""The measured images: created once, and kept in the registry's directory.

tree:gzip, tree:zstd, tree:plain   the same two layers in three forms; see tree.py
one:gzip                           only the lower of them: one big layer
entries:1000 ... entries:1000000   one layer with this number of small files
layers:1 ... layers:480            this number of layers with a few small files each
small:0 ... small:31               images without common layers, for concurrent callers
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Final, cast

import msgspec

from bench.layers import CODECS, MEDIA_TYPES, Blob, Codec, LayerWriter
from bench.registry import MANIFEST, Registry
from bench.tree import Layer, Node, Size, choose, merged, write_layer

_FORM: Final = 3  # version of the images; increase it to create all of them again
_BUSYBOX: Final = "/bin/busybox"  # of busybox-static
_CATALOG: Final = "catalog.json"
_FILES_IN_DIRECTORY: Final = 1000
_FILE_BYTES: Final = 100
_WITH_CONTENT: Final = 4  # every 4th file has content; a million of them would fill a small machine
_LAYER_FILES: Final = 20  # of an image of many layers
_SMALL_FILES: Final = 500


class LayerOf(msgspec.Struct, frozen=True):
    """One layer of an image. Sizes are in bytes."""

    digest: str
    diff_id: str
    size: int
    tar_size: int
    codec: Codec


class Image(msgspec.Struct, frozen=True):
    """An image in the registry. `entries` is the number of entries in its tars."""

    repository: str
    tag: str
    layers: tuple[LayerOf, ...]
    entries: int

    def reference(self, registry: Registry) -> str:
        """The reference for a pull."""
        return f"{registry.host}/{self.repository}:{self.tag}"

    @property
    def size(self) -> int:
        """Size of its blobs in bytes."""
        return sum(layer.size for layer in self.layers)

    @property
    def tar_size(self) -> int:
        """Size of its tars in bytes."""
        return sum(layer.tar_size for layer in self.layers)


class Images:
    """Creates images, or finds existing ones.

    Args:
        directory: holds the images, in a subdirectory per size.
        registry: the registry to push to; it stores in the same directory.
        size: the size of the tree.
        say: called with a message when an image is created.
    """

    def __init__(self, directory: Path, registry: Registry, size: Size, say: Callable[[str], None]) -> None:
        self._directory = directory
        self._registry = registry
        self._size = size
        self._say = say
        self._catalog: dict[str, Image] = {}
        path = directory / _CATALOG
        if path.exists():
            self._catalog = msgspec.json.decode(path.read_bytes(), type=dict[str, Image])

    def tree(self, codec: Codec) -> Image:
        """The tree, with one of its codecs."""
        return self._found(f"tree:{codec}", self._make_tree)

    def one_layer(self) -> Image:
        """Only the lower layer of the tree."""
        return self._found("one:gzip", self._make_tree)

    def plus(self) -> Image:
        """The tree and one more layer, so that it shares all layers of the tree."""
        return self._found("plus:gzip", self._make_plus)

    def nodes(self) -> list[Node]:
        """The expected result of a pull of the tree."""
        self.tree("gzip")
        return msgspec.json.decode(self._nodes_path.read_bytes(), type=list[Node])

    def entries(self, count: int) -> Image:
        """One layer with `count` files."""
        return self._found(f"entries:{count}", lambda: self._make_small(f"entries:{count}", [(0, count)]))

    def layers(self, count: int) -> Image:
        """`count` layers with a few files each."""
        parts = [(number * _LAYER_FILES, _LAYER_FILES) for number in range(count)]
        return self._found(f"layers:{count}", lambda: self._make_small(f"layers:{count}", parts))

    def small(self, number: int) -> Image:
        """One of many images without common layers."""
        parts = [((number + 1) * 10_000_000, _SMALL_FILES)]
        return self._found(f"small:{number}", lambda: self._make_small(f"small:{number}", parts))

    @property
    def _nodes_path(self) -> Path:
        return self._directory / "nodes.json"

    def _found(self, name: str, make: Callable[[], None]) -> Image:
        if f"{name} {_FORM}" not in self._catalog:
            make()
            content = msgspec.json.format(msgspec.json.encode(self._catalog))
            (self._directory / _CATALOG).write_bytes(content)
        return self._catalog[f"{name} {_FORM}"]

    def _make_tree(self) -> None:
        self._say(
            f"making the image: {self._size.entries} entries, {self._size.content_bytes / 1e9:.1f} GB of "
            "this machine's files, in gzip -6, zstd and plain (once; it is kept)"
        )
        lower, upper = choose(self._size)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="making-") as scratch:
            with ProcessPoolExecutor(2) as pool:
                making = [
                    pool.submit(_write, Path(scratch), name, layer)
                    for name, layer in (("lower", lower), ("upper", upper))
                ]
                (below, lower_nodes), (above, upper_nodes) = (one.result() for one in making)
            self._nodes_path.write_bytes(msgspec.json.encode(merged(lower_nodes, upper_nodes, upper)))
            entries = len(lower_nodes) + len(upper_nodes) + len(upper.removed) + len(upper.opaque)
            for codec in CODECS:
                self._push(f"tree:{codec}", codec, (below, above), entries)
            self._push("one:gzip", "gzip", (below,), len(lower_nodes))

    def _make_small(self, name: str, parts: Iterable[tuple[int, int]]) -> None:
        if name.startswith("entries:"):
            self._say(f"making the image {name} (once; it is kept)")
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="making-") as scratch:
            writers: list[LayerWriter] = []
            entries = 0
            for first, count in parts:
                with LayerWriter(Path(scratch), str(first), ("gzip",)) as writer:
                    entries += _write_small_files(writer, first, count)
                writers.append(writer)
            self._push(name, "gzip", writers, entries)

    def _make_plus(self) -> None:
        tree = self.tree("gzip")
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="making-") as scratch:
            with LayerWriter(Path(scratch), "plus", ("gzip",)) as writer:
                entries = tree.entries + _write_program(writer)
            self._push("plus:gzip", "gzip", (writer,), entries, tree)

    def _push(
        self,
        name: str,
        codec: Codec,
        writers: Sequence[LayerWriter],
        entries: int,
        base: Image | None = None,
    ) -> None:
        """Push an image of these layers, on top of those of another image of the registry."""
        repository, _, tag = name.partition(":")
        added = [writer.blobs[codec] for writer in writers]
        below = base.layers if base is not None else ()
        blobs = [
            Blob(self._registry.blob_path(layer.digest), layer.digest, layer.size) for layer in below
        ] + added
        for blob in blobs:
            self._registry.push_blob(repository, blob)
        layers = below + tuple(
            LayerOf(blob.digest, writer.diff_id, blob.size, writer.tar_size, codec)
            for blob, writer in zip(added, writers, strict=True)
        )
        diff_ids = [layer.diff_id for layer in layers]
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Cmd": ["/bin/true"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
            }
        ).encode()
        config_blob = _in_file(config, added[0].path.with_name("config"))
        self._registry.push_blob(repository, config_blob)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config_blob),
            "layers": [_descriptor(MEDIA_TYPES[codec], blob) for blob in blobs],
        }
        self._registry.push_manifest(repository, tag, json.dumps(manifest).encode())
        self._catalog[f"{name} {_FORM}"] = Image(repository, tag, layers, entries)


def _descriptor(media_type: str, blob: Blob) -> dict[str, str | int]:
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}


def _in_file(content: bytes, path: Path) -> Blob:
    from hashlib import sha256

    path.write_bytes(content)
    return Blob(path, f"sha256:{sha256(content).hexdigest()}", len(content))


def _write(scratch: Path, name: str, layer: Layer) -> tuple[LayerWriter, list[Node]]:
    with LayerWriter(scratch, name) as writer:
        nodes = write_layer(layer, writer)
    return writer, nodes


def _write_program(writer: LayerWriter) -> int:
    """Write a tar with one static program; return its number of entries."""
    busybox = Path(_BUSYBOX).read_bytes()
    with tarfile.open(fileobj=cast("IO[bytes]", writer), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        directory = tarfile.TarInfo("bin")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(directory)
        program = tarfile.TarInfo("bin/true")
        program.mode, program.size = 0o755, len(busybox)
        tar.addfile(program, io.BytesIO(busybox))
    return 2


def _write_small_files(writer: LayerWriter, first: int, count: int) -> int:
    """Write a tar with small files; return its number of entries."""
    entries = 0
    with tarfile.open(fileobj=cast("IO[bytes]", writer), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + count):
            directory = f"files/{number // _FILES_IN_DIRECTORY}"
            if number % _FILES_IN_DIRECTORY == 0 or number == first:
                header = tarfile.TarInfo(directory)
                header.type, header.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(header)
                entries += 1
            content = b"" if number % _WITH_CONTENT else f"{number}\n".encode().ljust(_FILE_BYTES, b".")
            header = tarfile.TarInfo(f"{directory}/{number}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
            entries += 1
    return entries
