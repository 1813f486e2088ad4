"""Shared by the commands: how they report warnings, and whether they leave a work directory tidy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeAlias

from guestpull_server.store import LOCK

Warn: TypeAlias = Callable[[Iterable[str]], object]
"""Called with the warnings of a store that was opened."""


def is_tidy(work_dir: str) -> bool:
    """Return whether no daemon has ever served a work directory: a daemon leaves its lock file there."""
    return not os.path.lexists(os.path.join(work_dir, LOCK))
