"""The rules of FairQueue, and threads that wait in FairSemaphore."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import Cancelled, DeadlineExceeded
from guestpull_server.pull.fair_semaphore import FairQueue, FairSemaphore, as_many_as_are_free
from support.waiting import PATIENCE, end_of


class Waiter(Cancellation):
    """A caller that sets `is_waiting` when it has entered the queue."""

    def __init__(self) -> None:
        super().__init__("waiting")
        self.is_waiting = threading.Event()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        withdraw = super().on_cancel(callback)
        self.is_waiting.set()
        return withdraw


def test_the_limit_bounds_how_many_turns_are_held() -> None:
    semaphore = FairSemaphore(3)
    active = 0
    most = 0
    lock = threading.Lock()
    barrier = threading.Barrier(3, timeout=PATIENCE)

    def visit() -> None:
        nonlocal active, most
        with semaphore.acquire(Cancellation("test")):
            with lock:
                active += 1
                most = max(most, active)
            barrier.wait()
            with lock:
                active -= 1

    visitors = [threading.Thread(target=visit) for _ in range(21)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        end_of(visitor)

    assert most == 3
    assert active == 0


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


def test_a_caller_that_leaves_the_queue_does_not_take_a_turn() -> None:
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


def test_a_waiter_of_a_key_with_fewer_turns_goes_first() -> None:
    queue: FairQueue[str] = FairQueue(2)
    for key, waiter in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1")):
        queue.put(key, waiter)
    assert [queue.take(), queue.take()] == ["a1", "b1"]

    queue.give_back("b")

    assert queue.take() == "a2"


@pytest.mark.parametrize(("turns", "one_key"), [(1, 1), (2, 1), (3, 2), (16, 8)])
def test_a_single_key_gets_half_of_the_turns(turns: int, one_key: int) -> None:
    queue: FairQueue[int] = FairQueue(turns, as_many_as_are_free)
    for number in range(turns):
        queue.put("greedy", number)

    given = list(iter(queue.take, None))

    assert given == list(range(one_key))


def test_keys_that_return_no_turns_leave_some_for_another_key() -> None:
    queue: FairQueue[str] = FairQueue(16, as_many_as_are_free)
    for key in ("first", "second", "third", "fourth"):
        for _ in range(16):
            queue.put(key, key)
        while queue.take() is not None:
            pass

    queue.put("newcomer", "newcomer")

    assert queue.take() == "newcomer"


class FairQueueMachine(RuleBasedStateMachine):
    """Waiters enter, leave and return turns in any order."""

    @initialize(limit=st.integers(1, 12), leaves_a_reserve=st.booleans())
    def open(self, limit: int, leaves_a_reserve: bool) -> None:
        self.limit = limit
        self.share = as_many_as_are_free if leaves_a_reserve else (lambda _free: limit)
        self.queue: FairQueue[object] = FairQueue(limit, self.share)
        self.waiting: list[tuple[str, object]] = []
        self.held: list[str] = []

    @rule(key=st.sampled_from("abcde"))
    def enter(self, key: str) -> None:
        waiter = object()
        self.queue.put(key, waiter)
        self.waiting.append((key, waiter))
        self._admit()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key, waiter = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        assert self.queue.remove(key, waiter)
        assert not self.queue.remove(key, waiter)
        self._admit()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        key = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.queue.give_back(key)
        self._admit()

    def _admit(self) -> None:
        while (admitted := self.queue.take()) is not None:
            best = min(
                (self.held.count(key), number)
                for number, (key, _) in enumerate(self.waiting)
                if self._may_have_another(key)
            )
            key, waiter = self.waiting.pop(best[1])
            assert admitted is waiter
            self.held.append(key)

    def _may_have_another(self, key: str) -> bool:
        free = self.limit - len(self.held)
        return free > 0 and self.held.count(key) < self.share(free)

    @invariant()
    def the_limit_bounds_how_many_turns_are_held(self) -> None:
        assert len(getattr(self, "held", ())) <= getattr(self, "limit", 0)

    @invariant()
    def no_waiter_waits_that_may_have_a_turn(self) -> None:
        assert not [key for key, _ in getattr(self, "waiting", ()) if self._may_have_another(key)]


TestFairQueue = FairQueueMachine.TestCase


def test_no_turn_is_lost_when_callers_leave() -> None:
    semaphore = FairSemaphore(3, as_many_as_are_free)
    results: Counter[str] = Counter()
    lock = threading.Lock()
    active = 0
    most = 0

    def visit(number: int) -> None:
        nonlocal active, most
        chance = random.Random(number)
        for _ in range(50):
            caller = Cancellation("visit")
            leaving = threading.Thread(target=caller.cancel)
            if chance.random() < 0.5:
                leaving.start()
            try:
                with semaphore.acquire(caller, f"key {chance.randrange(4)}"):
                    with lock:
                        active += 1
                        most = max(most, active)
                        results["admitted"] += 1
                    with lock:
                        active -= 1
            except Cancelled:
                with lock:
                    results["left"] += 1
            if leaving.ident is not None:
                end_of(leaving)

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(8)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        end_of(visitor)

    assert results.total() == 8 * 50
    assert most <= 3
    with ExitStack() as stack:  # all turns are free again, for any key
        for key in "ab":
            stack.enter_context(semaphore.acquire(Cancellation("after"), key))
