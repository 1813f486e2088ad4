"""What the commands of upkeep share: how they report warnings, and when they leave a work directory tidy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeAlias

from guestpull_server.store import LOCK

Warn: TypeAlias = Callable[[Iterable[str]], object]
"""Called with what was found in a store when it was opened; a sentence each."""


def is_tidy(work_dir: str) -> bool:
    """Whether no daemon has ever served a work directory: a daemon leaves its lock there."""
    return not os.path.lexists(os.path.join(work_dir, LOCK))
