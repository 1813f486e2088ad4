"""Flights: what is shared, and what of a failure is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_server.config import Configuration, Limits
from guestpull_server.errors import BlobNotFound, WorkerFailed
from guestpull_server.flights import Flights
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import Cancellation, Digest, LayerDescriptor
from guestpull_server.registry import ImageSource, Reference, RegistryClient
from guestpull_server.store import Store
from support.images import file, layer
from support.pulling import IMPATIENT, descriptor_of
from support.simulator import RegistrySimulator
from support.stores import open_store

LAYER = layer(file("a"))


@pytest.fixture
def source() -> Iterator[ImageSource]:
    """An image that no registry has."""
    with RegistrySimulator() as registry:
        client = RegistryClient(Configuration(limits=IMPATIENT))
        yield client.image(Reference.parse(f"{registry.host}/nothing:1"), None)
        client.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "work")
    yield store
    store.close()


def test_a_layer_for_which_no_thread_can_be_had_is_downloaded_the_next_time(
    store: Store, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = LayerWorkers(Limits())
    flights = Flights(store, workers, Limits())
    wanted = LayerDescriptor(descriptor_of(LAYER), Digest(LAYER.diff_id))

    def fetch() -> None:
        flights.fetch(wanted, source, Cancellation("pull", time.monotonic() + 10), lambda _bytes: None)

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(WorkerFailed, match="can't start new thread"):
            fetch()

    with pytest.raises(BlobNotFound):
        fetch()
    workers.close()
