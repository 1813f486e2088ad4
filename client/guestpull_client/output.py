"""What the command line prints: tables for people, JSON for machines.

On a terminal a table is as wide as it is; elsewhere nothing is cut or folded, for whoever reads it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import typer

from guestpull_client.text import is_terminal, one_line


def print_json(document: object) -> None:
    """One JSON document; data classes become objects."""
    typer.echo(json.dumps(document, default=_as_json, indent=2))


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value)} has no JSON")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines, as docker's and podman's are."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        _print_folded(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in (columns, *cells):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _print_folded(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        Column(columns[0], overflow="fold"),  # names and paths, of any length
        *(Column(column, no_wrap=True) for column in columns[1:]),
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)
