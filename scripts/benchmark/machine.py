"""What is measured on: a tmpfs, a registry on loopback, and process trees with their CPU seconds and memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class NotEnough(Exception):
    """The machine lacks what a measurement needs; the text says what."""


def available_bytes() -> int:
    """Memory that a tmpfs may take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise NotEnough("/proc/meminfo does not tell how much memory is available")


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


@contextlib.contextmanager
def tmpfs(size_bytes: int) -> Iterator[Path]:
    """A tmpfs that is gone afterwards, with all that was mounted in it."""
    directory = Path(tempfile.mkdtemp(prefix="guestpull-bench-"))
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=755", "guestpull-bench", directory],
        check=True,
    )
    try:
        yield directory
    finally:
        points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for point in sorted((one for one in points if one.startswith(f"{directory}/")), reverse=True):
            subprocess.run(["umount", "--lazy", point], check=False)
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Registry:
    """Debian's docker-registry, storing in a directory that is kept. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.host = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", suffix=".yml", delete=False) as file:
            file.write(
                "version: 0.1\nlog: {level: error}\n"
                f"storage: {{filesystem: {{rootdirectory: {self._directory}}}}}\nhttp: {{addr: {self.host}}}\n"
            )
        self._configuration = Path(file.name)
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(["docker-registry", "serve", file.name], stdout=quiet, stderr=quiet)
        for _ in range(500):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
                return self
            time.sleep(0.02)
        raise NotEnough("docker-registry does not start")

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        end(self._process)
        self._configuration.unlink()

    def has(self, repository: str, tag: str) -> bool:
        """Whether an image was pushed in an earlier run."""
        request = urllib.request.Request(
            f"http://{self.host}/v2/{repository}/manifests/{tag}",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        )
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            error.close()
            return False
        return True


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, by force if need be."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tree_of(pid: int) -> list[int]:
    """A process and all that descends from it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += tree_of(int(child))
    return found


class Meter:
    """CPU seconds of process trees, and the peak of their memory, while the block lasts. A context manager.

    Processes come and go, and nobody adds up those of our layer workers: the meter looks every 10 ms and keeps
    what it last saw of each. Memory is the sum of proportional set sizes (PSS), which costs the kernel a walk
    over page tables: it is looked at only where it is asked for, in rounds that are not timed.

    Args:
        pids: roots of the trees; this process's own is never among them.
        memory: whether to look at memory.
    """

    def __init__(self, *pids: int, memory: bool = False) -> None:
        self._pids = pids
        self._memory = memory
        self._done = threading.Event()
        self._seen: dict[tuple[int, int], float] = {}
        self._before: dict[tuple[int, int], float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_pss_bytes = 0
        self.cpu_seconds = 0.0

    def watch(self, pid: int) -> None:
        """Take in a process that was started just now."""
        self._pids += (pid,)

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._seen)
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self.cpu_seconds = sum(self._seen.values()) - sum(self._before.values())

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def _look(self) -> None:
        pss = 0
        for root in self._pids:
            for pid in tree_of(root):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    # utime and stime; and those of children that were waited for, if this is not our own child
                    ticks = int(fields[11]) + int(fields[12])
                    self._seen[pid, int(fields[19])] = ticks / _TICKS
                    if self._memory:
                        pss += _pss(pid)
        self.peak_pss_bytes = max(self.peak_pss_bytes, pss)


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def remove(path: Path) -> None:
    """Delete a directory, whatever is in it."""
    if path.exists():
        shutil.rmtree(path)


def settle() -> None:
    """Let what was deleted be gone before the next measurement begins."""
    os.sync()
    time.sleep(0.3)


def on_signals_exit() -> None:
    """Have SIGTERM end the program as Ctrl-C does: by way of all clean-ups."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
