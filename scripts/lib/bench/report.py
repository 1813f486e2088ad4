"""Figures, their tables, and the JSON file."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

Unit: TypeAlias = Literal["s", "CPU s", "ms", "us", "MiB", "GB/s", "/s", "%", "x"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """The values of one measurement.

    Attributes:
        row: the name of the row, as for `--only`.
        subject: the measured tool or case.
        unit: the unit of `values`.
        at_most: goal: upper bound of the median.
        at_least: goal: lower bound of the median.
        at_most_p99: goal: upper bound of the 99th percentile.
    """

    row: str
    subject: str
    unit: Unit
    values: list[float]
    at_most: float | None = None
    at_least: float | None = None
    at_most_p99: float | None = None

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """The 99th percentile; the largest value of fewer than a hundred."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]

    @property
    def goal(self) -> str:
        """The goal in words; empty if there is none."""
        parts: list[str] = []
        if self.at_most is not None:
            parts.append(f"at most {_short(self.at_most)} {self.unit}")
        if self.at_least is not None:
            parts.append(f"at least {_short(self.at_least)} {self.unit}")
        if self.at_most_p99 is not None:
            parts.append(f"p99 at most {_short(self.at_most_p99)} {self.unit}")
        return ", ".join(parts)

    @property
    def met(self) -> bool:
        """Whether all goals are met; true if there are none."""
        return (
            (self.at_most is None or self.median <= self.at_most)
            and (self.at_least is None or self.median >= self.at_least)
            and (self.at_most_p99 is None or self.p99 <= self.at_most_p99)
        )

    @property
    def spread(self) -> str:
        """The smallest and the largest value; for many values, the 99th percentile."""
        if len(self.values) == 1:
            return ""
        if len(self.values) < 100:
            return f"{_short(min(self.values))} to {_short(max(self.values))}"
        return f"p99 {_short(self.p99)}, {len(self.values)} values"


class Report:
    """All figures in the order of their measurement; shown as they are added."""

    def __init__(self, facts: dict[str, str]) -> None:
        self._facts = facts
        self.figures: list[Figure] = []

    def say(self, text: str = "") -> None:
        """Print a line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        """Print the title of the next measurement."""
        self.say()
        self.say(text)

    def add(self, *figures: Figure) -> None:
        """Add figures and print them."""
        self.figures += figures
        for figure in figures:
            verdict = "" if not figure.goal else f"   [{figure.goal}: {'met' if figure.met else 'MISSED'}]"
            middle = f"{_short(figure.median):>8} {figure.unit}"
            self.say(f"  {figure.subject:<46} {middle:<14} {figure.spread:<22}{verdict}".rstrip())

    def keep(self, *figures: Figure) -> None:
        """Add figures that are printed elsewhere."""
        self.figures += figures

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; its first column is text, the others are figures."""
        widths = [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]
        for row in [columns, *rows]:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            self.say(f"  {'   '.join(cells)}".rstrip())

    def verdicts(self) -> None:
        """Print the number of goals that were met, and those that were missed."""
        with_goal = [figure for figure in self.figures if figure.goal]
        if not with_goal:
            return
        missed = [figure for figure in with_goal if not figure.met]
        self.title(f"Goals: {len(with_goal) - len(missed)} of {len(with_goal)} met")
        for figure in missed:
            self.say(
                f"  missed: {figure.row}, {figure.subject}: {_short(figure.median)} {figure.unit} "
                f"({figure.spread}), wanted {figure.goal}"
            )

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        document = {
            "facts": self._facts,
            "figures": [
                msgspec.to_builtins(figure)
                | {"median": figure.median, "met": figure.met if figure.goal else None}
                for figure in self.figures
            ],
        }
        path.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")


def shown(values: Sequence[float], render: Callable[[float], str] | None = None) -> str:
    """A median with its spread."""
    render = render or _short
    if len(values) == 1:
        return render(values[0])
    return f"{render(statistics.median(values))} ({render(min(values))}-{render(max(values))})"


def _short(value: float) -> str:
    """Format a value with three significant digits."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"
