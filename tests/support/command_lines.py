"""Command lines, run within the test's own process, and judged by what a shell sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import pytest


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


CommandLine: TypeAlias = Callable[..., Outcome]


def command_line(
    main: Callable[[], NoReturn],
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capture: pytest.CaptureFixture[str],
) -> CommandLine:
    """A function that runs a program's `main` with arguments."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", [program, *arguments])
        capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, said.out, said.err)

    return run
