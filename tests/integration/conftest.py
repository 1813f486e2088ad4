"""A registry, a disk in memory, a daemon: what most integration tests begin with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_server.config import Limits
from guestpull_server.layer import LayerWorkers
from support.daemon import Daemon, Tmpfs
from support.peers import DockerRegistry
from support.simulator import RegistrySimulator
from support.unpacking import Unpacker


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """Debian's registry; tests use repositories of their own."""
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def registry() -> Iterator[RegistrySimulator]:
    """A registry that remembers its requests, and fails on demand."""
    with RegistrySimulator() as simulator:
        yield simulator


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs; nothing may be left mounted below it."""
    with Tmpfs(tmp_path / "disk") as directory:
        yield directory


@pytest.fixture
def open_disk() -> Iterator[Path]:
    """A tmpfs that other users reach; pytest's own directories are closed to them."""
    directory = Path(tempfile.mkdtemp(prefix="guestpull-test-"))
    directory.chmod(0o755)
    with Tmpfs(directory / "disk") as disk:
        disk.chmod(0o755)
        yield disk
    shutil.rmtree(directory)


@pytest.fixture
def daemon(disk: Path) -> Iterator[Daemon]:
    """A guestpulld with an empty store."""
    with Daemon(disk) as running:
        yield running


@pytest.fixture(scope="session")
def workers() -> Iterator[LayerWorkers]:
    """Layer workers with the default limits."""
    started = LayerWorkers(Limits())
    yield started
    started.close()


@pytest.fixture
def unpacker(disk: Path, workers: LayerWorkers) -> Unpacker:
    """Unpacks layers beside canaries."""
    return Unpacker(disk, workers)
