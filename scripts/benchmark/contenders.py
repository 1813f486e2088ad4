"""guestpull and its peers, each pulling as its users would have it: a cold pull, ready to start a container.

A contender pulls into a directory on the tmpfs, shows its root filesystem to be checked, and forgets all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from benchmark.machine import Meter, NotEnough, end, remove, settle
from guestpull_client import Client
from guestpull_client.errors import GuestpullError

_PY_SPY: Final = ("py-spy", "record", "--subprocesses", "--rate", "200", "--format", "speedscope", "--output")


@dataclass(frozen=True)
class Cost:
    """What one pull cost."""

    seconds: float
    cpu_seconds: float
    peak_pss_bytes: int = 0


class Contender(Protocol):
    """Something that pulls."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Compressions that it can unpack."""

    def pull(self, reference: str, *, memory: bool = False) -> Cost:
        """Pull into an empty store; everything that it takes is measured."""

    def rootfs(self, reference: str) -> contextlib.AbstractContextManager[Path]:
        """What came of it."""

    def forget(self, reference: str) -> None:
        """Delete it; not measured."""


def command(*arguments: str | Path) -> None:
    """Run a command; its output is shown if it fails."""
    done = subprocess.run(arguments, capture_output=True, check=False)
    if done.returncode != 0:
        raise NotEnough(f"{' '.join(map(str, arguments))}: {done.stderr.decode(errors='replace')[-2000:]}")


def measured(*arguments: str | Path, daemon: int | None = None, memory: bool = False) -> Cost:
    """Run a command and measure it, with the daemon that works for it."""
    with Meter(*([daemon] if daemon is not None else []), memory=memory) as meter:
        started = time.monotonic()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        meter.watch(process.pid)
        _, errors = process.communicate()
        seconds = time.monotonic() - started
    if process.returncode != 0:
        raise NotEnough(f"{' '.join(map(str, arguments))}: {errors.decode(errors='replace')[-2000:]}")
    return Cost(seconds, meter.cpu_seconds, meter.peak_pss_bytes)


class Guestpull:
    """guestpulld, and a pull through the Python client. A context manager.

    Args:
        directory: for its work directory and bundles.
        cores: to run on; all, if it is empty.
        profile: where py-spy is to write what it sees of the daemon and its workers.
    """

    name = "guestpull"
    formats = ("gzip", "zstd", "plain")

    def __init__(
        self, directory: Path, cores: frozenset[int] = frozenset(), profile: Path | None = None
    ) -> None:
        self.work_dir = directory / "work"
        self._bundle = directory / "bundle"
        self._directory = directory
        self._cores = cores
        self._profile = profile
        self._profiler: subprocess.Popen[bytes] | None = None
        self.client = Client(f"unix://{directory}/guestpull.sock")

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self._profiler is not None:
            self._profiler.terminate()
            self._profiler.wait(60)
        end(self.process)
        remove(self._directory)

    def start(self) -> float:
        """Start the daemon; returns the seconds until it was healthy."""
        arguments = [sys.executable, "-m", "guestpull_server.cli", "serve", "--work-dir", str(self.work_dir)]
        arguments += ["--listen", f"unix://{self._directory}/guestpull.sock"]
        pinned = ["taskset", "--cpu-list", ",".join(map(str, sorted(self._cores)))] if self._cores else []
        log = (self._directory / "log").open("ab")
        started = time.monotonic()
        with log:
            self.process = subprocess.Popen([*pinned, *arguments], stderr=log)
        socket = self._directory / "guestpull.sock"
        while True:
            if socket.exists():
                with contextlib.suppress(GuestpullError):
                    if self.client.is_healthy():
                        break
            if self.process.poll() is not None or time.monotonic() - started > 30:
                raise NotEnough(f"guestpulld does not start: {(self._directory / 'log').read_text()[-2000:]}")
            time.sleep(0.002)
        seconds = time.monotonic() - started
        if self._profile is not None and self._profiler is None:
            self._profile.mkdir(parents=True, exist_ok=True)
            self._profiler = subprocess.Popen(
                [*_PY_SPY, str(self._profile / "guestpull.speedscope.json"), "--pid", str(self.process.pid)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return seconds

    def stop(self) -> None:
        """End the daemon."""
        end(self.process)

    def pull(self, reference: str, *, memory: bool = False, progress: bool = False) -> Cost:
        """See Contender; with progress, all events are read."""
        with Meter(self.process.pid, memory=memory) as meter:
            started = time.monotonic()
            if progress:
                for _ in self.client.pull_with_progress(reference, str(self._bundle)):
                    pass
            else:
                self.client.pull(reference, str(self._bundle))
            seconds = time.monotonic() - started
        return Cost(seconds, meter.cpu_seconds, meter.peak_pss_bytes)

    @contextlib.contextmanager
    def rootfs(self, _reference: str) -> Iterator[Path]:
        """See Contender."""
        yield self._bundle / "rootfs"

    def forget(self, reference: str) -> None:
        """See Contender."""
        self.client.release_bundle(str(self._bundle))
        self.client.remove_image(reference)


class Podman:
    """podman, as root, with overlay storage on the tmpfs."""

    name = "podman"
    formats = ("gzip", "zstd", "plain")

    def __init__(self, directory: Path) -> None:
        self._storage = [f"--root={directory}/root", f"--runroot={directory}/run", "--storage-driver=overlay"]

    def pull(self, reference: str, *, memory: bool = False) -> Cost:
        """See Contender."""
        arguments = ["pull", "--quiet", "--tls-verify=false", f"docker://{reference}"]
        return measured("podman", *self._storage, *arguments, memory=memory)

    @contextlib.contextmanager
    def rootfs(self, reference: str) -> Iterator[Path]:
        """See Contender."""
        mount = ["podman", *self._storage, "image", "mount", reference]
        shown = subprocess.run(mount, capture_output=True, text=True, check=True).stdout.strip()
        try:
            yield Path(shown)
        finally:
            command("podman", *self._storage, "image", "unmount", reference)

    def forget(self, reference: str) -> None:
        """See Contender."""
        command("podman", *self._storage, "rmi", "--force", reference)


class Containerd:
    """containerd with its overlayfs snapshotter on the tmpfs, and ctr. A context manager."""

    name = "containerd"
    formats = ("gzip", "zstd", "plain")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ctr = ["ctr", "--address", f"{directory}/containerd.sock"]

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True)
        configuration = self._directory / "config.toml"
        configuration.write_text(
            f'version = 2\nroot = "{self._directory}/root"\nstate = "{self._directory}/state"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self._directory}/containerd.sock"\n'
        )
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["containerd", "--config", configuration], stdout=log, stderr=log
            )
        for _ in range(500):
            if subprocess.run([*self._ctr, "version"], capture_output=True, check=False).returncode == 0:
                return self
            time.sleep(0.02)
        raise NotEnough(f"containerd does not start: {(self._directory / 'log').read_text()[-2000:]}")

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        end(self._process)
        remove(self._directory)

    def pull(self, reference: str, *, memory: bool = False) -> Cost:
        """See Contender."""
        arguments = ["images", "pull", "--plain-http", "--snapshotter", "overlayfs", reference]
        return measured(*self._ctr, *arguments, daemon=self._process.pid, memory=memory)

    @contextlib.contextmanager
    def rootfs(self, reference: str) -> Iterator[Path]:
        """See Contender."""
        mounted = self._directory / "mounted"
        mounted.mkdir()
        command(*self._ctr, "images", "mount", "--snapshotter", "overlayfs", reference, mounted)
        try:
            yield mounted
        finally:
            command(*self._ctr, "images", "unmount", "--snapshotter", "overlayfs", "--rm", mounted)
            mounted.rmdir()

    def forget(self, reference: str) -> None:
        """See Contender."""
        command(*self._ctr, "images", "rm", "--sync", reference)
        command(*self._ctr, "content", "prune", "references")


class SkopeoUmoci:
    """skopeo copies into an OCI layout, umoci unpacks it."""

    name = "skopeo+umoci"
    formats = ("gzip",)

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def pull(self, reference: str, *, memory: bool = False) -> Cost:
        """See Contender."""
        self._directory.mkdir()
        layout = f"{self._directory}/layout"
        copy = ["--quiet", "--insecure-policy", "--src-tls-verify=false", f"docker://{reference}"]
        copied = measured("skopeo", "copy", *copy, f"oci:{layout}:it", memory=memory)
        unpack = ["--image", f"{layout}:it", f"{self._directory}/bundle"]
        unpacked = measured("umoci", "unpack", *unpack, memory=memory)
        return Cost(
            copied.seconds + unpacked.seconds,
            copied.cpu_seconds + unpacked.cpu_seconds,
            max(copied.peak_pss_bytes, unpacked.peak_pss_bytes),
        )

    @contextlib.contextmanager
    def rootfs(self, _reference: str) -> Iterator[Path]:
        """See Contender."""
        yield self._directory / "bundle/rootfs"

    def forget(self, _reference: str) -> None:
        """See Contender."""
        remove(self._directory)


def fingerprint(rootfs: Path) -> str:
    """What came of a pull, in a few bytes: each path with its type, mode, owner, size, target, and contents."""
    digest = hashlib.sha256()
    for directory, names, files in os.walk(rootfs):
        names.sort()
        for name in sorted((*names, *files)):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            size = 0 if os.path.isdir(path) and not os.path.islink(path) else status.st_size
            facts = (os.path.relpath(path, rootfs), status.st_mode, status.st_uid, status.st_gid, size)
            digest.update(repr((*facts, int(status.st_mtime) if size else 0)).encode())
            if os.path.islink(path):
                digest.update(os.readlink(path).encode())
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cold_pull(contender: Contender, reference: str, expected: list[str], *, memory: bool = False) -> Cost:
    """One cold pull, its result checked against those before it.

    Raises:
        NotEnough: the result is another one than the others'.
    """
    settle()
    cost = contender.pull(reference, memory=memory)
    with contender.rootfs(reference) as rootfs:
        found = fingerprint(rootfs)
    contender.forget(reference)
    if expected and found != expected[0]:
        raise NotEnough(f"{contender.name} made another file tree of {reference} than those before it")
    expected[:] = [found]
    return cost
