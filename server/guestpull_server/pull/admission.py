"""Admits pulls: a queue in front of all pulls, and a time limit for each.

A pull holds one turn at a time: a turn to work on this machine, or a turn to use its registry. Work on this
machine never waits for the network, so a registry that does not respond delays only the pulls that use it.

    with admission.admitted(image, caller) as admitted:
        ...                                      # work here: look into the store
        admitted.use_registry("registry.example")
        ...                                      # resolve, download
        admitted.work_here()
        ...                                      # mount
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import DeadlineExceeded, LimitExceeded, TooManyPulls
from guestpull_server.pull.fair_semaphore import FairSemaphore


class AdmittedPull:
    """An admitted pull and the turn that it holds. Belongs to one thread.

    It begins with a turn to work here, for which the constructor waits.

    Attributes:
        cancellation: of the pull. It is cancelled with the caller's, and when the pull exceeds its time limit.

    Raises:
        Cancelled: the caller left while waiting.
        DeadlineExceeded: the pull's time ran out while waiting.
    """

    def __init__(self, admission: Admission, cancellation: Cancellation, turn: ExitStack) -> None:
        self.cancellation = cancellation
        self._admission = admission
        self._turn = turn
        self._registry: str | None = None  # of its turn; "" for local images; None for a turn to work here
        self._turn.enter_context(admission.working.acquire(cancellation))

    def work_here(self) -> None:
        """Return the turn that the pull holds, and wait for one to work on this machine.

        Raises:
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the pull's time ran out while waiting.
        """
        if self._registry is not None:
            self._turn.close()
            self._turn.enter_context(self._admission.working.acquire(self.cancellation))
            self._registry = None

    def use_registry(self, registry: str) -> None:
        """Return the turn that the pull holds, and wait for one to use a registry.

        Args:
            registry: `host[:port]`, or empty for a local image, which can take as long to read.

        Raises:
            TooManyPulls: too many pulls wait for this registry.
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the pull's time ran out while waiting.
        """
        if self._registry != registry:
            self._turn.close()
            self._turn.enter_context(self._admission.using_registry(registry, self.cancellation))
            self._registry = registry


class Admission:
    """The queue of pulls. Thread-safe.

    Attributes:
        working: the turns to work on this machine.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.working = FairSemaphore(limits.max_concurrent_pulls)
        self._registry_turns = FairSemaphore(
            limits.max_queued_pulls, lambda _free: limits.max_concurrent_pulls
        )
        self._lock = threading.Lock()
        self._pulls = 0
        self._pulls_of_registry: Counter[str] = Counter()

    @contextmanager
    def admitted(self, image: str, caller: Cancellation) -> Iterator[AdmittedPull]:
        """Admit a pull while the block runs. It begins with a turn to work here.

        Raises:
            TooManyPulls: the queue is full.
            LimitExceeded: the pull took longer than `max_pull_seconds`.
            Cancelled: the caller left while waiting.
            DeadlineExceeded: the caller's time ran out.
        """
        with self._lock:
            if self._pulls >= self._limits.max_queued_pulls:
                raise TooManyPulls(self._limits.max_queued_pulls)
            self._pulls += 1
        try:
            with (
                caller.nested(f"pull of {image}", self._limits.max_pull_seconds) as cancellation,
                ExitStack() as turn,
            ):
                yield AdmittedPull(self, cancellation, turn)
        except DeadlineExceeded:
            if caller.cancelled:
                raise
            raise LimitExceeded(
                f"pull of {image}", "max_pull_seconds", self._limits.max_pull_seconds
            ) from None
        finally:
            with self._lock:
                self._pulls -= 1

    @contextmanager
    def using_registry(self, registry: str, cancellation: Cancellation) -> Iterator[None]:
        """Wait for a turn to use a registry, and hold it while the block runs; see AdmittedPull.use_registry."""
        limit = self._limits.max_queued_pulls_per_registry
        with self._lock:
            if self._pulls_of_registry[registry] >= limit:
                raise TooManyPulls(limit, registry or "local images")
            self._pulls_of_registry[registry] += 1
        try:
            with self._registry_turns.acquire(cancellation, registry):
                yield
        finally:
            with self._lock:
                self._pulls_of_registry[registry] -= 1
                if not self._pulls_of_registry[registry]:
                    del self._pulls_of_registry[registry]
