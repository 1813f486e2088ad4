"""The context that every row gets: place, registry, images, number of rounds, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.daemon import Daemon, serving
from bench.images import Image, Images
from bench.memory import watched
from bench.place import Cgroup, Place
from bench.registry import Registry
from bench.report import Report


@dataclass(frozen=True, slots=True)
class Bench:
    """The context of a row. `quick`: measure less of everything, for a first impression."""

    place: Place
    registry: Registry
    images: Images
    report: Report
    rounds: int
    quick: bool
    cores: int

    @contextmanager
    def daemon(self, *additional_stores: Path) -> Iterator[tuple[Daemon, Cgroup]]:
        """Run a guestpulld with an empty store on a tmpfs, and optional read-only stores."""
        with (
            self.place.tmpfs() as directory,
            self.place.cgroup() as cgroup,
            serving(directory, cgroup, additional_stores) as daemon,
        ):
            yield daemon, cgroup

    def cold_pull(self, image: Image) -> float:
        """Seconds of one cold pull by guestpulld."""
        with self.daemon() as (daemon, _):
            bundle = daemon.new_bundle()
            begun = time.monotonic()
            daemon.client.pull(image.reference(self.registry), bundle)
            seconds = time.monotonic() - begun
            daemon.client.release_bundle(bundle)
        return seconds

    def peak_of_cold_pull(self, image: Image) -> float:
        """Peak memory, in MiB, of daemon and workers in one cold pull."""
        with self.daemon() as (daemon, cgroup):
            bundle = daemon.new_bundle()
            with watched(cgroup) as peak:
                daemon.client.pull(image.reference(self.registry), bundle)
            daemon.client.release_bundle(bundle)
        return peak.bytes / 2**20
