"""The semaphore that admits waiters in FIFO order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import Cancelled, DeadlineExceeded
from guestpull_server.fair_semaphore import FairSemaphore
from support.waiting import PATIENCE, end_of


class Waiter(Cancellation):
    """A caller of whom it is known when it has taken its place in the queue."""

    def __init__(self) -> None:
        super().__init__("waiting")
        self.is_waiting = threading.Event()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        withdraw = super().on_cancel(callback)
        self.is_waiting.set()
        return withdraw


def test_no_more_than_the_limit_are_in_at_once() -> None:
    semaphore = FairSemaphore(3)
    inside = 0
    most = 0
    lock = threading.Lock()
    three = threading.Barrier(3, timeout=PATIENCE)

    def visit() -> None:
        nonlocal inside, most
        with semaphore.acquire(Cancellation("test")):
            with lock:
                inside += 1
                most = max(most, inside)
            three.wait()
            with lock:
                inside -= 1

    visitors = [threading.Thread(target=visit) for _ in range(21)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        end_of(visitor)

    assert most == 3
    assert inside == 0


def test_waiters_are_admitted_in_fifo_order() -> None:
    semaphore = FairSemaphore(1)
    order: list[int] = []

    def visit(number: int, caller: Waiter) -> None:
        with semaphore.acquire(caller):
            order.append(number)

    with semaphore.acquire(Cancellation("first")):
        callers = [Waiter() for _ in range(5)]
        visitors = [threading.Thread(target=visit, args=one) for one in enumerate(callers)]
        for caller, visitor in zip(callers, visitors, strict=True):
            visitor.start()
            assert caller.is_waiting.wait(PATIENCE)
    for visitor in visitors:
        end_of(visitor)

    assert order == [0, 1, 2, 3, 4]


def test_a_caller_that_leaves_the_queue_takes_no_turn_with_it() -> None:
    semaphore = FairSemaphore(1)
    leaving = Waiter()
    failures: list[Exception] = []

    def visit() -> None:
        try:
            with semaphore.acquire(leaving):
                pass
        except Cancelled as error:
            failures.append(error)

    with semaphore.acquire(Cancellation("first")):
        visitor = threading.Thread(target=visit)
        visitor.start()
        assert leaving.is_waiting.wait(PATIENCE)
        leaving.cancel()
        end_of(visitor)

    assert len(failures) == 1
    with semaphore.acquire(Cancellation("next")):
        pass


def test_waiting_ends_at_the_deadline() -> None:
    semaphore = FairSemaphore(1)
    with (
        semaphore.acquire(Cancellation("first")),
        Cancellation("late").nested(seconds=0.01) as late,
        pytest.raises(DeadlineExceeded),
        semaphore.acquire(late),
    ):
        pass
    with Cancellation("next").nested(seconds=PATIENCE) as following, semaphore.acquire(following):
        pass
