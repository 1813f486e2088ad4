"""Who may pull now: a queue in front of all pulls, and a bound on the time that each may take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import DeadlineExceeded, LimitExceeded, TooManyPulls
from guestpull_server.fair_semaphore import FairSemaphore


class Admission:
    """The queue of pulls. Thread-safe."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._semaphore = FairSemaphore(limits.max_concurrent_pulls)
        self._idle = threading.Condition()
        self._pulls = 0

    @property
    def pulls(self) -> int:
        """Pulls that are under way or wait for their turn."""
        return self._pulls

    def wait_until_idle(self) -> None:
        """Return once no pull is under way any more; cancelled ones take a moment to clean up."""
        with self._idle:
            self._idle.wait_for(lambda: self._pulls == 0)

    @contextmanager
    def admitted(self, image: str, caller: Cancellation) -> Iterator[Cancellation]:
        """Wait for a turn, and hold it; gives the pull's own cancellation, which its time ends as well.

        Raises:
            TooManyPulls: the queue is full.
            LimitExceeded: the pull took longer than any may.
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the caller's time ran out.
        """
        with self._idle:
            if self._pulls >= self._limits.max_queued_pulls:
                raise TooManyPulls(self._limits.max_queued_pulls)
            self._pulls += 1
        try:
            with (
                caller.nested(f"pull of {image}", self._limits.max_pull_seconds) as cancellation,
                self._semaphore.acquire(cancellation),
            ):
                yield cancellation
        except DeadlineExceeded:
            if caller.cancelled:
                raise
            raise LimitExceeded(
                f"pull of {image}", "max_pull_seconds", self._limits.max_pull_seconds
            ) from None
        finally:
            with self._idle:
                self._pulls -= 1
                self._idle.notify_all()
