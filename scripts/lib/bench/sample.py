"""Samples the lines in which a layer worker spends its time, from within the process.

py-spy cannot inspect a worker, which is chrooted into its layer. This program runs the worker's code, chrooted
too, and samples the main thread, which reads the tar and creates the entries, with a timer. Time in a system
call or a library counts for the line that called it.

    python -P -m bench.sample BLOB DIRECTORY   > one line per place: number of samples, place; most samples first
"""

from __future__ import annotations

import collections
import os
import signal
import sys
from types import FrameType
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer import worker
from guestpull_server.layer.worker_protocol import Unpacked, UnpackRequest
from guestpull_server.models import Digest

_INTERVAL: Final = 0.001  # seconds
_SPAN_BYTES: Final = 256 * 1024
_HASH: Final = Digest.of(b"").algorithm


def _main(blob: str, directory: str) -> None:
    samples: collections.Counter[str] = collections.Counter()

    def sample(_signal: int, frame: FrameType | None) -> None:
        if frame is not None:
            code = frame.f_code
            file = os.path.basename(code.co_filename)
            samples[f"{file}:{frame.f_lineno} {code.co_qualname}"] += 1

    file = os.open(blob, os.O_RDONLY)
    buffer = memoryview(bytearray(_SPAN_BYTES))

    def next_span() -> memoryview | None:
        length = os.readv(file, [buffer])
        return buffer[:length] if length else None

    os.chroot(directory)
    os.chdir("/")
    os.umask(0)
    signal.signal(signal.SIGALRM, sample)
    signal.setitimer(signal.ITIMER_REAL, _INTERVAL, _INTERVAL)
    report, _ = worker.unpack(
        UnpackRequest(directory="/", hash_algorithm=_HASH, hash_plain=True, limits=Limits()), next_span
    )
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert isinstance(report, Unpacked), report
    for place, count in samples.most_common():
        sys.stdout.write(f"{count:6} {place}\n")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
