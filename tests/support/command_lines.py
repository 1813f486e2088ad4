"""Runs command lines, in the test's process or in a separate one, and returns what a shell sees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

import pytest

from support.waiting import PATIENCE


@dataclass(frozen=True)
class Outcome:
    """The exit status of a command, and its output."""

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
        output = capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, output.out, output.err)

    return run


def into_full_disk(module: str, arguments: Sequence[str], *, buffered: bool) -> Outcome:
    """Run a program with a full device as standard output, with or without Python's buffer."""
    with open("/dev/full", "wb") as full:
        return _run(module, arguments, buffered, full.fileno())


def into_closed_pipe(module: str, arguments: Sequence[str], *, buffered: bool) -> Outcome:
    """Run a program whose standard output is a pipe without a reader."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return _run(module, arguments, buffered, writing)
    finally:
        os.close(writing)


def with_few_descriptors(limit: int, module: str, arguments: Sequence[str]) -> Outcome:
    """Run a program with a limit of open files."""
    command = ["prlimit", f"--nofile={limit}", sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    return Outcome(done.returncode, done.stdout, done.stderr)


def _run(module: str, arguments: Sequence[str], buffered: bool, stdout: int) -> Outcome:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment if buffered else environment | {"PYTHONUNBUFFERED": "1"},
        check=False,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    return Outcome(done.returncode, "", done.stderr)
