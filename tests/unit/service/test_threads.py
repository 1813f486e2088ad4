"""The thread pools that run RPCs."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from guestpull_server.service.threads import AnsweringThreads
from support.waiting import PATIENCE


def test_existing_threads_run_the_work_if_no_other_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = AnsweringThreads(4, "rpc")
    release = threading.Event()
    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", refuse)
        busy: Future[bool] = pool.submit(release.wait, PATIENCE)
        waiting: Future[int] = pool.submit(lambda: 7)
    release.set()

    assert busy.result(PATIENCE)
    assert waiting.result(PATIENCE) == 7
    pool.shutdown()


def test_work_runs_in_several_threads() -> None:
    pool = AnsweringThreads(2, "rpc")
    barrier = threading.Barrier(2, timeout=PATIENCE)

    futures = [pool.submit(barrier.wait) for _ in range(2)]

    assert sorted(future.result(PATIENCE) for future in futures) == [0, 1]
    pool.shutdown()
