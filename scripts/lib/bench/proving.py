"""Measures how fast a layer is verified, by the size of its files: unpacks it with a tar-split, then verifies it.

python -m bench.proving DIRECTORY FILE_BYTES   > gigabytes of tar per CPU second of the verification
"""

from __future__ import annotations

import gc
import hashlib
import io
import random
import sys
import tarfile
import time
from pathlib import Path
from typing import IO, Final, cast

from guestpull_server.config import Limits
from guestpull_server.layer import LayerWorker, LayerWorkers, implied_fingerprint, verify_layer
from guestpull_server.models import Digest

_LAYER_BYTES: Final = 512 * 1024 * 1024
_FILES_IN_DIRECTORY: Final = 500
_HASH: Final = Digest.of(b"").algorithm


class _Feed:
    """A file object for `tarfile` to write to, which feeds a worker and a hash."""

    def __init__(self, worker: LayerWorker) -> None:
        self._worker = worker
        self._hash = hashlib.new(_HASH)
        self.size = 0

    @property
    def digest(self) -> Digest:
        return Digest(f"{_HASH}:{self._hash.hexdigest()}")

    def write(self, piece: bytes) -> int:
        self._worker.write(memoryview(piece))
        self._hash.update(piece)
        self.size += len(piece)
        return len(piece)


def _main(directory: Path, file_bytes: int) -> None:
    root, tar_split_path = directory / "layer", directory / "tar-split"
    root.mkdir()
    workers = LayerWorkers(Limits())
    with workers.unpack(str(root), _HASH, "the layer", tar_split_path=str(tar_split_path)) as worker:
        feed = _Feed(worker)
        _write_files(feed, file_bytes)
        implied = worker.finish().implied_directories
    gc.disable()  # as in a verifying worker
    begun = time.process_time()
    changes = verify_layer(str(root), str(tar_split_path), feed.digest, implied=implied_fingerprint(implied))
    seconds = time.process_time() - begun
    assert not changes, changes
    sys.stdout.write(f"{feed.size / 1e9 / seconds}\n")
    workers.close()


def _write_files(feed: _Feed, file_bytes: int) -> None:
    content = random.Random(file_bytes).randbytes(file_bytes)
    with tarfile.open(fileobj=cast("IO[bytes]", feed), mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(_LAYER_BYTES // file_bytes):
            member = tarfile.TarInfo(f"{number // _FILES_IN_DIRECTORY}/{number}")
            member.size = file_bytes
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
