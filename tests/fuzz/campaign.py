"""Runs targets for a time, and keeps the inputs that fail."""

from __future__ import annotations

import random
import resource
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from fuzz.targets import Target

_SECONDS_AN_INPUT: Final = 10
_MEMORY_BYTES: Final = 2 << 30
_AT_ONCE: Final = 200  # inputs of one target before the next one's turn


class TooSlow(BaseException):
    """An input took too long. Not an `Exception`, so that the target does not catch it."""


@dataclass(frozen=True)
class Failure:
    """An input that failed."""

    target: str
    number: int
    reproducer: Path
    trace: str


@dataclass
class Campaign:
    """The results so far."""

    seed: int
    directory: Path
    inputs: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def run(self, targets: Sequence[Target], seconds: float) -> None:
        """Run the targets in turn until the time is up."""
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _too_slow)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for target in targets:
                self._take_turn(target, end)

    def _take_turn(self, target: Target, end: float) -> None:
        corpus = target.corpus()
        for _ in range(_AT_ONCE):
            if time.monotonic() >= end:
                return
            number = self.inputs.get(target.name, 0)
            self.inputs[target.name] = number + 1
            source = random.Random(f"{self.seed}/{target.name}/{number}")
            self.try_input(target, target.mutate(source, corpus), number)

    def try_input(self, target: Target, content: bytes, number: int) -> None:
        """Run one input; write it to a file if it fails."""
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_AN_INPUT)
        try:
            target.run(content)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 - any exception is a finding
            self.failures.append(self._keep(target, content, number))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _keep(self, target: Target, content: bytes, number: int) -> Failure:
        self.directory.mkdir(parents=True, exist_ok=True)
        reproducer = self.directory / f"{target.name}-{self.seed}-{number}"
        reproducer.write_bytes(content)
        return Failure(target.name, number, reproducer, traceback.format_exc())


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"took longer than {_SECONDS_AN_INPUT} seconds")
