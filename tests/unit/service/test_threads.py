"""The threads that answer RPCs."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from guestpull_server.service.threads import AnsweringThreads
from support.waiting import PATIENCE


def test_what_no_thread_can_be_had_for_is_done_by_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = AnsweringThreads(4, "rpc")
    go_on = threading.Event()
    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", no_thread)
        busy: Future[bool] = pool.submit(go_on.wait, PATIENCE)
        waiting: Future[int] = pool.submit(lambda: 7)
    go_on.set()

    assert busy.result(PATIENCE)
    assert waiting.result(PATIENCE) == 7
    pool.shutdown()


def test_there_are_more_threads_where_they_can_be_had() -> None:
    pool = AnsweringThreads(2, "rpc")
    meeting = threading.Barrier(2, timeout=PATIENCE)

    together = [pool.submit(meeting.wait) for _ in range(2)]

    assert sorted(one.result(PATIENCE) for one in together) == [0, 1]
    pool.shutdown()
