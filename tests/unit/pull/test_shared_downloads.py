"""Downloads and verifications that cannot start a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, Limits, VerifyReuse
from guestpull_server.errors import BlobNotFound, WorkerFailed
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import Digest, LayerDescriptor
from guestpull_server.pull import Unobserved
from guestpull_server.pull.layer_fetcher import LayerFetcher
from guestpull_server.pull.layer_verification import LayerVerification
from guestpull_server.pull.shared_downloads import SharedDownloads
from guestpull_server.registry import ImageSource, Reference, RegistryClient
from guestpull_server.store import Store
from support.faults import Stall
from support.images import file, image, layer
from support.pulling import PATIENT, descriptor_of
from support.simulator import RegistrySimulator
from support.stores import open_store, put_layer, resolved
from support.waiting import PATIENCE

LAYER = layer(file("a"))


@pytest.fixture
def source() -> Iterator[ImageSource]:
    """An image that the registry does not have."""
    with RegistrySimulator() as registry:
        client = RegistryClient(Configuration(limits=PATIENT))
        yield client.image(Reference.parse(f"{registry.host}/nothing:1"), None)
        client.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "work")
    yield store
    store.close()


def test_a_download_without_a_thread_fails_and_the_next_one_starts(
    store: Store, source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = LayerWorkers(Limits())
    downloads = SharedDownloads(store, workers, Limits())
    wanted = LayerDescriptor(descriptor_of(LAYER), Digest(LAYER.diff_id))

    def fetch() -> None:
        caller = Cancellation("pull", time.monotonic() + PATIENCE)
        list(downloads.fetch([wanted], source, caller, lambda _layer, _bytes: None, at_once=1))

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WorkerFailed, match="can't start new thread"):
            fetch()

    with pytest.raises(BlobNotFound):
        fetch()
    workers.close()


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_fetch_that_runs_out_of_threads_fails_and_the_next_one_succeeds(
    store: Store, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    pushed = image(*(layer(file(name)) for name in "abc"))
    workers = LayerWorkers(Limits())
    fetcher = LayerFetcher(store, SharedDownloads(store, workers, Limits()), at_once=3)
    start = threading.Thread.start
    left = [started]

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("download"):
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)

    with RegistrySimulator() as registry:
        client = RegistryClient(Configuration(limits=PATIENT))
        source = client.image(Reference.parse(registry.push("three:1", pushed)), None)

        def fetch() -> list[bool]:
            wanted = resolved(pushed, source.reference)
            _, pulled = fetcher.fetch(wanted, source, Cancellation("pull"), Unobserved())
            return [one.reused for one in pulled]

        registry.fault(pushed.layers[0], Stall(after=0.5))
        with monkeypatch.context() as patching:
            patching.setattr(threading.Thread, "start", refuse)
            with pytest.raises(WorkerFailed, match="can't start new thread"):
                fetch()

        registry.calm()
        assert fetch()[2] is False
        client.close()
    workers.close()


def test_a_verification_that_runs_out_of_threads_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_layer(store, LAYER)
    workers = LayerWorkers(Limits())
    verification = LayerVerification(store, VerifyReuse.ALWAYS, workers)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WorkerFailed, match="can't start new thread"):
            verification.discard_changed(resolved(image(LAYER), "shop:1"), Cancellation("pull"))
    workers.close()
