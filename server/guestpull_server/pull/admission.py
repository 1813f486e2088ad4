"""Who may pull now: a queue in front of all pulls, and a bound on the time that each may take.

A pull holds one turn at a time: to work on this machine, or to ask its registry and wait for it. Work here never
waits for a network, so a registry that does not answer delays nothing but the pulls that ask it.

    with admission.admitted(image, caller) as admitted:
        ...                                      # works here: looks into the store
        admitted.ask_registry("registry.example")
        ...                                      # resolves, downloads
        admitted.work_here()
        ...                                      # mounts
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
    """A pull that was admitted, and the turn that it holds. Belongs to one thread.

    Attributes:
        cancellation: the pull's own, which ends with the caller and when the pull has taken too long.

    Raises:
        Cancelled: the caller left while waiting for the first turn, which is to work here.
        DeadlineExceeded: its time ran out while waiting.
    """

    def __init__(self, admission: Admission, cancellation: Cancellation, turn: ExitStack) -> None:
        self.cancellation = cancellation
        self._admission = admission
        self._turn = turn
        self._registry: str | None = None  # whose turn it holds, or "" for local images; None: works here
        self._turn.enter_context(admission.working.acquire(cancellation))

    def work_here(self) -> None:
        """Wait for a turn to work on this machine, and give back the one that the pull holds.

        Raises:
            Cancelled: the caller left while waiting.
            DeadlineExceeded: its time ran out while waiting.
        """
        if self._registry is not None:
            self._turn.close()
            self._turn.enter_context(self._admission.working.acquire(self.cancellation))
            self._registry = None

    def ask_registry(self, registry: str) -> None:
        """Wait for a turn to ask a registry, and give back the one that the pull holds.

        Args:
            registry: `host[:port]`; empty: a local image, which may take as long to read.

        Raises:
            TooManyPulls: too many pulls wait for this registry.
            Cancelled: the caller left while waiting.
            DeadlineExceeded: its time ran out while waiting.
        """
        if self._registry != registry:
            self._turn.close()
            self._turn.enter_context(self._admission.asking(registry, self.cancellation))
            self._registry = registry


class Admission:
    """The queue of pulls. Thread-safe.

    Attributes:
        working: the turns to work on this machine.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.working = FairSemaphore(limits.max_concurrent_pulls)
        self._asking = FairSemaphore(limits.max_queued_pulls, lambda _free: limits.max_concurrent_pulls)
        self._lock = threading.Lock()
        self._pulls = 0
        self._pulls_of_registry: Counter[str] = Counter()

    @contextmanager
    def admitted(self, image: str, caller: Cancellation) -> Iterator[AdmittedPull]:
        """Count a pull while the block runs. It begins with a turn to work here.

        Raises:
            TooManyPulls: the queue is full.
            LimitExceeded: the pull took longer than any may.
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
    def asking(self, registry: str, cancellation: Cancellation) -> Iterator[None]:
        """Wait for a turn to ask a registry; see AdmittedPull.ask_registry."""
        most = self._limits.max_queued_pulls_per_registry
        with self._lock:
            if self._pulls_of_registry[registry] >= most:
                raise TooManyPulls(most, registry or "local images")
            self._pulls_of_registry[registry] += 1
        try:
            with self._asking.acquire(cancellation, registry):
                yield
        finally:
            with self._lock:
                self._pulls_of_registry[registry] -= 1
                if not self._pulls_of_registry[registry]:
                    del self._pulls_of_registry[registry]
