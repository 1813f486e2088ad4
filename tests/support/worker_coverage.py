"""Measures branch coverage of layer workers, which are forked, chrooted, and killed after their report.

coverage.py measures the processes that tests start, but cannot write its data file in a worker: the worker's root
is the layer that it unpacks. The fork server therefore opens a file before it forks, and each worker appends its
measurement to that file before it reports:

    length (8 bytes, little-endian), then the output of CoverageData.dumps

pyproject.toml names this module as a plugin of coverage.py; the files lie beside its own, $COVERAGE_FILE. Run as a
program, it merges them into an ordinary data file:

    python -P -m support.worker_coverage
"""

from __future__ import annotations

import os
import posix
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from coverage import Coverage, CoverageData
from coverage.plugin_support import Plugins
from coverage.types import TConfigSectionOut

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FORK_SERVER: Final = "guestpull_server.layer.fork_server"
_LENGTH: Final = struct.Struct("<Q")
_OF_WORKERS: Final = "-of-workers-"


def coverage_init(_plugins: Plugins, _options: TConfigSectionOut) -> None:
    """Have coverage.py measure the workers of this process, if it is a fork server."""
    if _FORK_SERVER not in sys.orig_argv:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    file = os.open(f"{_data_file()}{_OF_WORKERS}{os.getpid()}", flags, 0o600)
    # create this here: a worker cannot import anything
    measured = Coverage(
        data_file=None, config_file=False, branch=True, source_pkgs=["guestpull_server"], messages=False
    )
    measured.set_option("run:disable_warnings", ["module-not-python", "module-not-measured"])
    CoverageData(no_disk=True).dumps()
    os.register_at_fork(after_in_child=lambda: _measure(measured, file))


def _data_file() -> Path:
    return Path(os.environ["COVERAGE_FILE"])


def _measure(measured: Coverage, file: int) -> None:
    """Start a new measurement in this worker, instead of continuing the fork server's."""
    from guestpull_server.layer import verifier, worker

    inherited = Coverage.current()
    if inherited is not None:
        inherited.stop()
    os._exit = posix._exit  # coverage.py's wrapper would write the fork server's data again

    def saving(work: Callable[_P, _R]) -> Callable[_P, _R]:
        def saved(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                return work(*args, **kwargs)
            finally:
                measured.stop()
                dump = measured.get_data().dumps()
                os.write(file, _LENGTH.pack(len(dump)) + dump)

        return saved

    worker.unpack = saving(worker.unpack)
    verifier.verify_layer = saving(verifier.verify_layer)  # type: ignore[attr-defined]
    measured.start()


def merge(data_file: Path) -> int:
    """Merge the measurements of all workers into a data file beside coverage.py's; return their number."""
    merged = CoverageData(f"{data_file}.workers")
    workers = 0
    for path in sorted(data_file.parent.glob(f"{data_file.name}{_OF_WORKERS}*")):
        content = path.read_bytes()
        position = 0
        while position < len(content):
            (length,) = _LENGTH.unpack_from(content, position)
            position += _LENGTH.size
            one = CoverageData(no_disk=True)
            one.loads(content[position : position + length])
            merged.update(one)
            position += length
            workers += 1
        path.unlink()
    merged.write()
    return workers


if __name__ == "__main__":
    sys.stdout.write(f"{merge(_data_file())} layer workers were measured\n")
