"""Waits for conditions, however slow and busy the machine is.

    until("both stand in the queue", lambda: len(queue) == 2)

A wait that takes too long is a failure with a name, instead of a suite that hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

PATIENCE: Final = 60.0  # seconds


def until(awaited: str, has_happened: Callable[[], object]) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it did not hold within `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not has_happened():
        assert time.monotonic() < deadline, f"in {PATIENCE:.0f} seconds it did not happen that {awaited}"
        threading.Event().wait(0.001)


def end_of(thread: threading.Thread) -> None:
    """Wait until a thread has ended.

    Raises:
        AssertionError: it did not end within `PATIENCE`.
    """
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{thread.name} has not ended in {PATIENCE:.0f} seconds"
