"""The fair queue."""

from __future__ import annotations

import threading

import pytest

from guestpull_server.errors import Cancelled, DeadlineExceeded
from guestpull_server.models import Cancellation
from guestpull_server.turns import Turns

PATIENCE = 10.0  # seconds; for what must happen, however slow the machine


def test_no_more_than_the_limit_are_in_at_once() -> None:
    turns = Turns(3)
    inside = 0
    most = 0
    lock = threading.Lock()

    def visit() -> None:
        nonlocal inside, most
        with turns.take(Cancellation("test")):
            with lock:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.005)
            with lock:
                inside -= 1

    visitors = [threading.Thread(target=visit) for _ in range(20)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(PATIENCE)

    assert most == 3
    assert inside == 0


def test_turns_are_given_in_the_order_of_coming() -> None:
    turns = Turns(1)
    order: list[int] = []

    def visit(number: int) -> None:
        with turns.take(Cancellation("test")):
            order.append(number)

    with turns.take(Cancellation("first")):
        visitors = [threading.Thread(target=visit, args=(number,)) for number in range(5)]
        for number, visitor in enumerate(visitors):
            visitor.start()
            while len(turns.waiting) <= number:
                threading.Event().wait(0.001)
    for visitor in visitors:
        visitor.join(PATIENCE)

    assert order == [0, 1, 2, 3, 4]


def test_a_caller_that_leaves_the_queue_takes_no_turn_with_it() -> None:
    turns = Turns(1)
    leaving = Cancellation("leaving")
    failures: list[Exception] = []

    def visit() -> None:
        try:
            with turns.take(leaving):
                pass
        except Cancelled as error:
            failures.append(error)

    with turns.take(Cancellation("first")):
        visitor = threading.Thread(target=visit)
        visitor.start()
        while not turns.waiting:
            threading.Event().wait(0.001)
        leaving.cancel()
        visitor.join(PATIENCE)

    assert len(failures) == 1
    with turns.take(Cancellation("next")):
        pass


def test_waiting_ends_at_the_deadline() -> None:
    turns = Turns(1)
    with (
        turns.take(Cancellation("first")),
        Cancellation("late").nested(seconds=0.01) as late,
        pytest.raises(DeadlineExceeded),
        turns.take(late),
    ):
        pass
    assert not turns.waiting
