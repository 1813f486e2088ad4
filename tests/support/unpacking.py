"""Unpacks layers as a pull does, with a worker and a staging directory, beside canaries.

unpacked = unpacker.unpack(file("etc/passwd", b"…"), symlink("lib", "usr/lib"))
unpacked.root / "etc/passwd"
unpacked.nodes[b"etc/passwd"].mode
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from guestpull_server.layer import LayerWorker, LayerWorkers
from guestpull_server.models import Digest, UnpackedLayer
from support.images import Compression, Entry, Layer, RawTar, layer
from support.trees import Node, differences, tree

CANARY = b"nobody may touch this"


@dataclass(frozen=True)
class Unpacked:
    """An unpacked layer."""

    root: Path
    layer: Layer
    result: UnpackedLayer
    tar_split: Path | None = None

    @property
    def nodes(self) -> dict[bytes, Node]:
        """All entries, by path."""
        return tree(self.root)

    @property
    def paths(self) -> set[bytes]:
        """The paths of all entries except the root."""
        return set(tree(self.root)) - {b""}

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return (self.root / path).read_bytes()

    def is_whiteout(self, path: str) -> bool:
        """Whether an entry is a whiteout for overlayfs."""
        status = (self.root / path).lstat()
        return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0

    def is_opaque(self, path: str) -> bool:
        """Whether an entry is an opaque directory for overlayfs."""
        try:
            return os.getxattr(self.root / path, "trusted.overlay.opaque", follow_symlinks=False) == b"y"
        except OSError:
            return False


class Unpacker:
    """Unpacks layers into new directories below `disk`, and checks that nothing else changes there."""

    def __init__(self, disk: Path, workers: LayerWorkers) -> None:
        self.workers = workers
        self._disk = disk
        self._count = 0
        canary = disk / "canary"
        canary.mkdir()
        (canary / "file").write_bytes(CANARY)
        (canary / "link").symlink_to("file")
        (disk / "passwd").write_bytes(CANARY)
        (disk / "etc").mkdir()
        (disk / "etc" / "passwd").write_bytes(CANARY)
        self._canaries = self._beside()

    def unpack(
        self, *entries: Entry | RawTar, compression: Compression = "gzip", tar_split: bool = False
    ) -> Unpacked:
        """Unpack a layer with these entries."""
        return self.unpack_layer(layer(*entries, compression=compression), tar_split=tar_split)

    def unpack_layer(self, one: Layer, *, tar_split: bool = False, skip_plain_hash: bool = False) -> Unpacked:
        """Unpack a layer, and check that nothing outside of its directory has changed."""
        root = self.directory()
        tar_split_path = root.with_suffix(".tar-split") if tar_split else None
        try:
            with self.workers.unpack(
                str(root),
                "sha256",
                one.digest,
                checked_digest=Digest(one.digest) if skip_plain_hash else None,
                tar_split_path=str(tar_split_path) if tar_split_path else None,
            ) as worker:
                worker.write(memoryview(one.blob))
                result = worker.finish()
        finally:
            self.check_canaries()
        assert result.diff_id == one.diff_id
        return Unpacked(root, one, result, tar_split_path)

    def directory(self) -> Path:
        """Create an empty directory to unpack into."""
        self._count += 1
        staging = self._disk / f"staging-{self._count}"
        staging.mkdir(mode=0o700)
        root = staging / "layer"
        root.mkdir(mode=0o755)
        return root

    def check_canaries(self) -> None:
        """Fail if anything but the staging directories changed."""
        assert differences(self._beside(), self._canaries) == []

    def _beside(self) -> dict[bytes, Node]:
        """All entries of the disk except staging directories; the time of the root shows additions."""
        found = tree(self._disk)
        return {path: node for path, node in found.items() if path and not path.startswith(b"staging-")}


def feed(worker: LayerWorker, blob: bytes, piece: int = 1 << 16) -> None:
    """Write a blob to a worker in pieces."""
    for start in range(0, len(blob), piece):
        worker.write(memoryview(blob)[start : start + piece])
