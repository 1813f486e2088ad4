from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestpull_server.store import Store, durability
from support.stores import MountsInMemory, open_store


@pytest.fixture(autouse=True)
def work_dirs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync nothing: syncing the file system of /tmp waits for whatever else this machine writes."""
    monkeypatch.setattr(durability, "is_volatile", lambda _path: True)


@pytest.fixture
def mounts() -> MountsInMemory:
    return MountsInMemory()


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def store(work_dir: Path, mounts: MountsInMemory) -> Iterator[Store]:
    store = open_store(work_dir, mounts)
    yield store
    store.close()


@pytest.fixture
def reopened(work_dir: Path, mounts: MountsInMemory, store: Store) -> Iterator[Callable[[], Store]]:
    """Close the store, and open it anew, as after a restart."""
    opened: list[Store] = [store]

    def reopen() -> Store:
        opened[-1].close()
        opened.append(open_store(work_dir, mounts))
        return opened[-1]

    yield reopen
    if len(opened) > 1:
        opened[-1].close()
