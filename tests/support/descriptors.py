"""A process with as many open descriptors as a busy daemon has."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

MANY: Final = 4096
_SPARE: Final = 1024  # for what the test itself opens


@contextmanager
def many_descriptors_open() -> Iterator[None]:
    """Keep MANY descriptors open during a block, so that new ones get higher numbers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY + _SPARE
    with ExitStack() as held:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, before[0]), max(wanted, before[1])))
        held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        first = os.open(os.devnull, os.O_RDONLY)
        held.callback(os.close, first)
        for _ in range(MANY - 1):
            held.callback(os.close, os.dup(first))
        yield
