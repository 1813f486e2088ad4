"""Calls at a later time."""

from __future__ import annotations

import threading

import pytest

from guestpull_server.registry.alarms import Alarms
from support.waiting import PATIENCE


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def test_alarms_ring_in_the_order_of_their_times_whatever_the_order_of_setting() -> None:
    alarms = Alarms()
    rung: list[str] = []
    done = threading.Event()
    all_are_set = threading.Event()
    alarms.after(0, lambda: wait_for(all_are_set))  # no other rings before
    alarms.after(0.06, done.set)
    alarms.after(0.04, lambda: rung.append("second"))
    alarms.after(0.02, lambda: rung.append("first"))
    all_are_set.set()

    assert done.wait(PATIENCE)
    assert rung == ["first", "second"]


def test_an_alarm_that_is_cancelled_does_not_ring() -> None:
    alarms = Alarms()
    rung: list[str] = []
    done = threading.Event()
    all_are_cancelled = threading.Event()
    alarms.after(0, lambda: wait_for(all_are_cancelled))  # no other rings before
    cancels = [alarms.after(0, lambda: rung.append("cancelled")) for _ in range(500)]
    alarms.after(0, done.set)
    for cancel in cancels:
        cancel()
        cancel()
    all_are_cancelled.set()

    assert done.wait(PATIENCE)
    assert rung == []


def test_an_alarm_that_is_set_by_an_alarm_rings_too() -> None:
    alarms = Alarms()
    done = threading.Event()

    def set_another() -> None:
        alarms.after(0, done.set)

    alarms.after(0, set_another)

    assert done.wait(PATIENCE)


def test_an_alarm_for_which_no_thread_can_be_had_is_an_error_and_the_next_one_rings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alarms = Alarms()
    rung: list[str] = []
    done = threading.Event()

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError):
            alarms.after(0, lambda: rung.append("never set"))
    alarms.after(0.01, done.set)

    assert done.wait(PATIENCE)
    assert rung == []
