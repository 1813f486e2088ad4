"""Unpacks one layer from a file with a worker, as a pull does, with or without a tar-split.

    python -m bench.unpacking BLOB DIRECTORY CPU_STAT [RECORD]   > CPU seconds, including the worker's

CPU_STAT is the cpu.stat file of this process's cgroup.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from bench.place import cpu_seconds_of
from guestpull_server.config import Limits
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import Digest

_PIECE_BYTES: Final = 1 << 20
_HASH: Final = Digest.of(b"").algorithm


def _main(blob: str, directory: str, cpu_stat: str, tar_split_path: str | None = None) -> None:
    workers = LayerWorkers(Limits())
    begun = cpu_seconds_of(Path(cpu_stat))
    with (
        open(blob, "rb") as file,
        workers.unpack(directory, _HASH, blob, tar_split_path=tar_split_path) as worker,
    ):
        while piece := file.read(_PIECE_BYTES):
            worker.write(memoryview(piece))
        worker.finish()
    sys.stdout.write(f"{cpu_seconds_of(Path(cpu_stat)) - begun}\n")
    workers.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
