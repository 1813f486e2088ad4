"""The layer workers as processes: limits, cancellation, death, and what they cost."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from guestpull_server.config import Limits
from guestpull_server.errors import CorruptLayer, LimitExceeded, StorageFailed, StorageFull, WorkerFailed
from guestpull_server.layer import LayerWorker, LayerWorkers
from guestpull_server.models import KiB, MiB
from support.daemon import Tmpfs
from support.descriptors import many_descriptors_open
from support.images import Entry, Layer, directory, file, files, layer, layer_of_tar, symlink, tar_of
from support.unpacking import Unpacker, feed
from support.waiting import PATIENCE, until

MakeWorkers = Callable[[Limits], LayerWorkers]


@pytest.fixture
def make_workers() -> Iterator[MakeWorkers]:
    with contextlib.ExitStack() as started:

        def make(limits: Limits) -> LayerWorkers:
            workers = LayerWorkers(limits)
            started.callback(workers.close)
            return workers

        yield make


def test_layers_are_unpacked_beside_many_open_descriptors(unpacker: Unpacker) -> None:
    with many_descriptors_open():
        assert unpacker.unpack(file("kept", b"whole")).read("kept") == b"whole"


# -- limits -------------------------------------------------------------------------------------------------

_LIMITS: dict[str, tuple[Limits, Layer]] = {
    "max_layer_bytes": (Limits(max_layer_bytes=9_999), layer(*files("d", count=10, size=1_000))),
    "max_layer_entries": (Limits(max_layer_entries=10), layer(*files("d", count=10))),
    "max_compression_ratio": (
        Limits(max_compression_ratio=100),
        layer_of_tar(tar_of([file("zeros", bytes(70 * MiB))])),
    ),
    "max_implied_directories": (
        Limits(max_implied_directories=10),
        layer(*(file(f"{number}/f") for number in range(11))),
    ),
    "max_implied_path_bytes": (
        Limits(max_implied_path_bytes=1_000),
        layer(*(file(f"{'d' * 100}{number}/f") for number in range(11))),
    ),
    "max_path_bytes": (Limits(max_path_bytes=100), layer(file("d/" * 50 + "f"))),
    "max_path_depth": (Limits(max_path_depth=20), layer(file("d/" * 21 + "f"))),
    "max_header_bytes": (Limits(max_header_bytes=1 * KiB), layer(file("f", pax={"comment": "c" * 2000}))),
    "max_xattr_bytes": (
        Limits(max_xattr_bytes=100),
        layer(file("f", pax={"SCHILY.xattr.user.x": "x" * 101})),
    ),
}


@pytest.mark.parametrize("limit", _LIMITS)
def test_what_exceeds_a_limit_is_refused_by_its_name(
    disk: Path, make_workers: MakeWorkers, limit: str
) -> None:
    limits, refused = _LIMITS[limit]
    with pytest.raises(LimitExceeded) as raised:
        Unpacker(disk, make_workers(limits)).unpack_layer(refused)
    assert (raised.value.limit, raised.value.allowed) == (limit, getattr(limits, limit))


@pytest.mark.parametrize("limit", [limit for limit in _LIMITS if limit != "max_compression_ratio"])
def test_what_just_fits_a_limit_is_unpacked(unpacker: Unpacker, limit: str) -> None:
    _, accepted = _LIMITS[limit]
    unpacker.unpack_layer(accepted)


def test_a_path_that_links_make_too_long_is_refused(disk: Path, make_workers: MakeWorkers) -> None:
    part = "d" * 200
    links = [symlink("l0", part)]
    links += [symlink(f"l{number}", f"l{number - 1}/{part}") for number in range(1, 25)]
    unpacker = Unpacker(disk, make_workers(Limits(max_path_bytes=2000)))
    with pytest.raises(LimitExceeded) as raised:
        unpacker.unpack(*links, *(file(f"l{number}/f") for number in range(25)))
    assert raised.value.limit == "max_path_bytes"


# -- death and cancellation ---------------------------------------------------------------------------------


def _endless() -> Layer:
    """A layer whose blob is fed but for its end, so that the worker waits for more."""
    return layer(file("f", random.Random(1).randbytes(2_000_000)), compression="none")


def _feed_for_ever(worker: LayerWorker, blob: bytes) -> NoReturn:
    while True:
        feed(worker, blob)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if status.rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_a_killed_worker_fails_by_name_and_is_gone(unpacker: Unpacker) -> None:
    with unpacker.workers.unpack(str(unpacker.directory()), "sha256", "sha256:…") as worker:
        feed(worker, _endless().blob[:1_000_000])
        (pid,) = _children(unpacker.workers.pid)
        threading.Timer(0.05, worker.kill).start()
        with pytest.raises(WorkerFailed, match="was killed"):
            _feed_for_ever(worker, bytes(1 * MiB))
    assert _gone(pid)


def test_a_worker_that_somebody_else_killed_fails_by_name(unpacker: Unpacker) -> None:
    with unpacker.workers.unpack(str(unpacker.directory()), "sha256", "sha256:…") as worker:
        (pid,) = _children(unpacker.workers.pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="died"):
            worker.finish()


def test_an_error_that_a_worker_does_not_know_is_named_and_no_death(unpacker: Unpacker) -> None:
    # no caller asks for a hash that there is not: an error of the kind that nobody foresees
    with unpacker.workers.unpack(str(unpacker.directory()), "sha0", "sha256:f00") as worker:
        with pytest.raises(
            WorkerFailed, match=r"unexpected error \(ValueError at hashlib.py:\d+\)"
        ) as raised:
            worker.finish()
        assert "report it" in str(raised.value)
        assert "kernel" not in str(raised.value)


def test_leaving_a_worker_ends_it_before_it_returns(unpacker: Unpacker) -> None:
    directory_path = unpacker.directory()
    with unpacker.workers.unpack(str(directory_path), "sha256", "sha256:…") as worker:
        feed(worker, layer(*files("d", count=3_000, size=100), compression="none").blob)
    before = set(directory_path.rglob("*"))
    assert _children(unpacker.workers.pid) == []
    assert set(directory_path.rglob("*")) == before


def test_killing_is_harmless_when_the_worker_is_done(unpacker: Unpacker) -> None:
    one = layer(file("f"))
    with unpacker.workers.unpack(str(unpacker.directory()), "sha256", one.digest) as worker:
        feed(worker, one.blob)
        worker.finish()
        worker.kill()
    worker.kill()


def test_a_worker_that_gives_up_ends_the_feeding(unpacker: Unpacker) -> None:
    with (
        unpacker.workers.unpack(str(unpacker.directory()), "sha256", "sha256:…") as worker,
        pytest.raises(CorruptLayer),
    ):
        _feed_for_ever(worker, b"\xaa" * MiB)


def test_when_the_fork_server_dies_its_workers_die_and_the_next_starts_another(
    disk: Path, make_workers: MakeWorkers
) -> None:
    unpacker = Unpacker(disk, make_workers(Limits()))
    with unpacker.workers.unpack(str(unpacker.directory()), "sha256", "sha256:…") as worker:
        (pid,) = _children(unpacker.workers.pid)
        os.kill(unpacker.workers.pid, signal.SIGKILL)
        assert _gone(pid)
        with pytest.raises(WorkerFailed):
            worker.finish()
    assert unpacker.unpack(file("f", b"x")).read("f") == b"x"


_DAEMON = """
import sys
from guestpull_server.config import Limits
from guestpull_server.layer import LayerWorker, LayerWorkers
workers = LayerWorkers(Limits())
worker = workers.unpack(sys.argv[1], "sha256", "sha256:…")
print(workers.pid, flush=True)
sys.stdin.read()
"""


def test_when_the_daemon_dies_fork_server_and_workers_die(unpacker: Unpacker) -> None:
    command = [sys.executable, "-c", _DAEMON, str(unpacker.directory())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        server = int(daemon.stdout.readline())
        workers = _children(server)
        daemon.kill()
    assert len(workers) == 1
    assert all(_gone(pid) for pid in (server, *workers))


def test_many_workers_at_once_unpack_as_one_after_the_other(unpacker: Unpacker) -> None:
    layers = [layer(*files(f"d{number}", count=50)) for number in range(16)]
    roots = [unpacker.directory() for _ in layers]
    failures: list[BaseException] = []

    def unpack(one: Layer, root: Path) -> None:
        try:
            with unpacker.workers.unpack(str(root), "sha256", one.digest) as worker:
                feed(worker, one.blob)
                assert worker.finish().diff_id == one.diff_id
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=unpack, args=pair) for pair in zip(layers, roots, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(len(list((root / f"d{number}").iterdir())) == 50 for number, root in enumerate(roots))


def test_workers_leave_no_descriptors_and_no_zombies(unpacker: Unpacker) -> None:
    unpacker.unpack(file("f"))
    ours = set(os.listdir("/proc/self/fd"))  # of which others may close some meanwhile
    servers = os.listdir(f"/proc/{unpacker.workers.pid}/fd")
    for _ in range(20):
        unpacker.unpack(file("f"))
        with pytest.raises(CorruptLayer):
            unpacker.unpack_layer(layer_of_tar(b"\xaa" * 600))
    assert set(os.listdir("/proc/self/fd")) <= ours
    assert os.listdir(f"/proc/{unpacker.workers.pid}/fd") == servers
    assert _children(unpacker.workers.pid) == []


# -- this machine -------------------------------------------------------------------------------------------


def test_a_full_disk_is_named(disk: Path, unpacker: Unpacker) -> None:
    with Tmpfs(disk / "staging-small", size="1m") as small:
        one = layer(file("f", random.Random(1).randbytes(2_000_000)))
        with (
            unpacker.workers.unpack(str(small), "sha256", one.digest) as worker,
            pytest.raises(StorageFull),
        ):
            _feed_for_ever(worker, one.blob)


def test_a_staging_directory_that_is_not_there_is_named(unpacker: Unpacker, disk: Path) -> None:
    with (
        pytest.raises(StorageFailed, match="No such file"),
        unpacker.workers.unpack(str(disk / "staging-missing"), "sha256", "sha256:…") as worker,
    ):
        worker.finish()


def test_a_worker_has_no_way_out_and_few_capabilities(unpacker: Unpacker) -> None:
    root = unpacker.directory()
    with unpacker.workers.unpack(str(root), "sha256", "sha256:…") as worker:
        feed(worker, layer(directory("d"), compression="none").blob[:1024])
        (pid,) = _children(unpacker.workers.pid)
        status = Path(f"/proc/{pid}/status")
        until("it is confined", lambda: "NoNewPrivs:\t1" in status.read_text())
        facts = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        assert os.readlink(f"/proc/{pid}/root") == str(root)
        capabilities = int(facts["CapEff"], 16)
        for forbidden in (
            2,
            12,
            16,
            17,
            18,
            19,
            22,
        ):  # DAC_READ_SEARCH NET_ADMIN MODULE RAWIO CHROOT PTRACE BOOT
            assert not capabilities >> forbidden & 1
        links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
        measuring = os.environ.get("COVERAGE_FILE", "/dev/null")  # COVERAGE=yes scripts/test
        files = [
            link
            for link in links
            if link.startswith("/") and link != "/dev/null" and not link.startswith(measuring)
        ]
        assert [link for link in files if link != "/memfd:guestpull layer (deleted)"] == _own_outputs()


def _own_outputs() -> list[str]:
    return [
        link
        for link in (os.readlink(f"/proc/self/fd/{number}") for number in (1, 2))
        if link.startswith("/") and link != "/dev/null"
    ]


# -- costs --------------------------------------------------------------------------------------------------


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * KiB
    raise AssertionError("no Pss_Anon")


def test_a_bomb_costs_a_worker_no_memory(unpacker: Unpacker) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    header = tar_of([file("zeros", bytes(512 * MiB))])[:512]
    root = unpacker.directory()
    with unpacker.workers.unpack(str(root), "sha256", "sha256:…") as worker:
        feed(worker, compressor.compress(header))
        for _ in range(300):
            feed(worker, compressor.compress(bytes(1 * MiB)))
        feed(worker, compressor.flush(zlib.Z_FULL_FLUSH))
        zeros = root / "zeros"
        until("half of it is there", lambda: zeros.exists() and zeros.stat().st_size >= 250 * MiB)
        (pid,) = _children(unpacker.workers.pid)
        assert _pss(pid) < 24 * MiB


def test_replacing_directories_costs_the_same_however_many_were_implied(unpacker: Unpacker) -> None:
    many = [file(f"i{number}/f") for number in range(20_000)]

    def ticks(*entries: Entry) -> int:
        """CPU time of a worker, until the last of its entries is there."""
        pushes_it_out = file("padding", bytes(4 * MiB))
        blob = layer(*entries, file("last"), pushes_it_out).blob
        root = unpacker.directory()
        with unpacker.workers.unpack(str(root), "sha256", "sha256:…") as worker:
            feed(worker, blob)
            until("all entries are there", (root / "last").exists)
            (pid,) = _children(unpacker.workers.pid)
            facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return int(facts[11]) + int(facts[12])  # in user mode, and in the kernel: proc(5)

    plain = ticks(*many)
    assert ticks(*many, *[directory("x"), file("x")] * 6000) < 4 * plain


def test_entries_cost_a_worker_no_memory(unpacker: Unpacker) -> None:
    entries = [file(f"d{number // 500}/f{number}") for number in range(20_000)]
    tar = tar_of([directory(f"d{number}") for number in range(200)])[: 200 * 512]
    tar += b"".join(one.header.tobuf() for one in entries)
    root = unpacker.directory()
    with unpacker.workers.unpack(str(root), "sha256", "sha256:…") as worker:
        feed(worker, gzip.compress(tar, 1)[:-20])
        until("most of it is there", lambda: (root / "d35").is_dir() and len(os.listdir(root / "d35")) > 0)
        (pid,) = _children(unpacker.workers.pid)
        assert _pss(pid) < 20 * MiB
