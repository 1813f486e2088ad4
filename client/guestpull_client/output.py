"""Output of the command line: tables for people, JSON for programs.

On a terminal, a table folds long names to the terminal's width if that is wide enough. Otherwise every row is one
complete line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Final

import typer

from guestpull_client.text import is_terminal, one_line

_FOLDED_COLUMNS: Final = frozenset({"REFERENCE", "BUNDLE"})  # names and paths may be long
_MIN_FOLDED_WIDTH: Final = 16  # columns of the terminal
_GAP: Final = 2  # columns of the terminal


def print_json(document: object) -> None:
    """Print one JSON document; data classes become objects."""
    typer.echo(json.dumps(document, default=_as_json, indent=2))


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value)} has no JSON")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without lines, like docker and podman."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if is_terminal(sys.stdout):
        _print_folded(columns, cells, widths)
    else:
        _print_whole(columns, cells, widths)


def _print_whole(columns: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    for row in (columns, *cells):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _print_folded(columns: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    headed: list[Column] = []
    needed = _GAP * (len(columns) - 1)
    for name, width in zip(columns, widths, strict=True):
        if name in _FOLDED_COLUMNS:
            needed += min(width, _MIN_FOLDED_WIDTH)
            headed.append(Column(name, overflow="fold", min_width=min(width, _MIN_FOLDED_WIDTH)))
        else:
            needed += width
            headed.append(Column(name, no_wrap=True))
    if needed > console.width:  # rich would omit columns
        _print_whole(columns, cells, widths)
        return
    table = Table(*headed, box=None, pad_edge=False, header_style="bold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
