"""Faults during calls: of the registry, the disk and the layer workers."""

from __future__ import annotations

import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from support.daemon import Daemon
from support.faults import (
    Corrupt,
    Cut,
    Drip,
    Endless,
    EndlessChunkHeader,
    EndlessTrailers,
    IgnoreRange,
    NoLength,
    Nonsense,
    OtherRange,
    Pause,
    RedirectLoop,
    Refuse,
    SlowHeader,
    Stall,
    Status,
    WrongLength,
)
from support.peers import run
from support.simulator import Fault, RegistrySimulator, Target
from torture.world import World

PATIENCE: Final = {
    "connect_timeout": 1.0,
    "read_timeout": 0.5,
    "max_attempts": 3,
    "max_retry_delay": 0.05,
    "min_bytes_per_second": 10_000,
}
"""Limits that let the daemon give up soon on faults that do not end."""

_BY_REGISTRY: Final = frozenset(
    {
        "REGISTRY_UNAVAILABLE",
        "RATE_LIMITED",
        "DIGEST_MISMATCH",
        "SIZE_MISMATCH",
        "INVALID_MANIFEST",
        "LIMIT_EXCEEDED",  # for a manifest or config without end
    }
)
_BY_DISK: Final = frozenset({"STORAGE_FULL"})
_BY_WORKERS: Final = frozenset({"WORKER_FAILED"})


class Weather:
    """The weather of one round.

    Args:
        choices: the source of random choices.
        registry: the registry that fails.
        world: the images whose blobs fail.
        daemon: the daemon whose workers are killed and whose disk fills up.
        disk: the mount point of the daemon's tmpfs.
        size: the size of that tmpfs without faults.
    """

    def __init__(
        self,
        choices: random.Random,
        registry: RegistrySimulator,
        world: World,
        daemon: Daemon,
        disk: Path,
        size: int,
    ) -> None:
        self._choices = choices
        self._registry = registry
        self._world = world
        self._daemon = daemon
        self._disk = disk
        self._size = size
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.possible: frozenset[str] = frozenset()
        """The reasons with which a pull may fail in this weather."""
        self.workers_killed = 0

    def begin(self) -> None:
        """Start the faults; some rounds have none."""
        for _ in range(self._choices.choice((0, 0, 2, 5, 10))):
            self._registry.fault(self._target(), self._fault(), times=self._choices.randint(1, 3))
            self.possible |= _BY_REGISTRY
        if self._choices.random() < 0.4:
            self.possible |= _BY_WORKERS
            self._start(self._kill_workers)
        if self._choices.random() < 0.2:
            self.possible |= _BY_DISK
            self._start(self._fill_disk)

    def end(self) -> None:
        """End all faults."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._resize(self._size)
        self._registry.calm()

    def _start(self, what: object) -> None:
        assert callable(what)
        thread = threading.Thread(target=what)
        self._threads.append(thread)
        thread.start()

    def _target(self) -> Target:
        image = self._choices.choice(self._world.images).image
        if image.layers and self._choices.random() < 0.8:
            return self._choices.choice(image.layers)
        return self._choices.choice((image, image.image_id))

    def _fault(self) -> Fault:
        share = self._choices.random()
        faults: tuple[Fault, ...] = (
            Status(500),
            Status(503),
            Status(429, retry_after="0"),
            Refuse(),
            Refuse(reset=True),
            Cut(share),
            Cut(share, reset=True),
            Stall(share),
            Drip(share, bytes_per_second=500),
            Endless(),
            Pause(share),
            Corrupt(share),
            SlowHeader(share / 2),
            WrongLength(1),
            WrongLength(-1),
            NoLength(),
            IgnoreRange(),
            OtherRange(share),
            RedirectLoop(),
            Nonsense(),
            EndlessTrailers(0.1),
            EndlessChunkHeader(share, 0.1),
        )
        return self._choices.choice(faults)

    def _kill_workers(self) -> None:
        """Kill layer workers, and sometimes the fork server."""
        while not self._over.wait(self._choices.uniform(0.0, 0.1)):
            fork_server, *workers = self._daemon.workers() or [0]
            victim = fork_server if self._choices.random() < 0.1 else workers[0] if workers else 0
            if victim:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    self.workers_killed += 1

    def _fill_disk(self) -> None:
        """Sometimes leave little space on the disk."""
        while not self._over.wait(self._choices.uniform(0.0, 0.3)):
            status = os.statvfs(self._disk)
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
            self._resize(used + self._choices.randrange(0, 400_000))
            self._over.wait(self._choices.uniform(0.0, 0.3))
            self._resize(self._size)

    def _resize(self, size: int) -> None:
        # the content may have grown meanwhile, so that the disk cannot shrink that far
        run("mount", "-o", f"remount,size={size}", str(self._disk), check=False)
