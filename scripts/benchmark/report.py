"""What was measured, as tables for people and as JSON for machines."""

from __future__ import annotations

import datetime as dt
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark.bound import Bound
from benchmark.contenders import Cost
from benchmark.growth import Row
from benchmark.machine import cpu_name


class Report:
    """Collects the rows of a run, and prints them as they come."""

    def __init__(self) -> None:
        self._console = Console(width=None if Console().is_terminal else 150, highlight=False)
        self.document: dict[str, Any] = {
            "machine": {
                "cpu": cpu_name(),
                "cores": len(os.sched_getaffinity(0)),
                "kernel": os.uname().release,
                "date": dt.datetime.now(dt.UTC).date().isoformat(),
            }
        }

    def say(self, text: str) -> None:
        """A line for people."""
        self._console.print(text)

    def cold(
        self,
        kind: str,
        costs: Mapping[str, Sequence[Cost]],
        memory: Mapping[str, Cost],
        bound: Bound,
        cores: int,
    ) -> None:
        """The table of cold pulls of one format."""
        table = Table(title=f"cold pull, {kind}", title_justify="left", box=None, pad_edge=False)
        for column in ("", "median s", "min - max", "CPU s", "peak MiB", "times slower", "of the bound"):
            table.add_column(column, justify="left" if not column else "right")
        bound_seconds = bound.cpu_seconds / cores
        fastest = _median(costs["guestpull"])
        rows: dict[str, Any] = {}
        for name, rounds in costs.items():
            seconds = [cost.seconds for cost in rounds]
            median = _median(rounds)
            cpu = statistics.median(cost.cpu_seconds for cost in rounds)
            peak = memory[name].peak_pss_bytes / 2**20
            table.add_row(
                name,
                f"{median:.2f}",
                f"{min(seconds):.2f} - {max(seconds):.2f}",
                f"{cpu:.2f}",
                f"{peak:.0f}",
                f"{median / fastest:.2f}",
                f"{median / bound_seconds:.2f}",
            )
            rows[name] = {
                "seconds": [round(one, 3) for one in seconds],
                "median": round(median, 3),
                "cpu_seconds": round(cpu, 3),
                "peak_MiB": round(peak, 1),
                "ratio_to_guestpull": round(median / fastest, 3),
                "ratio_to_bound": round(median / bound_seconds, 3),
            }
        self._console.print(table)
        self.say(
            f"the bound: inflate {bound.inflate:.2f} + hashes {bound.hash_compressed:.2f} and "
            f"{bound.hash_tar:.2f} + files {bound.create:.2f} = {bound.cpu_seconds:.2f} CPU s, "
            f"on {cores} cores {bound_seconds:.2f} s\n"
        )
        self.document[f"cold {kind}"] = {"contenders": rows, "bound": asdict(bound)}

    def row(self, name: str, row: Row) -> None:
        """One row of guestpull alone."""
        self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
        self.document.setdefault("rows", {}).setdefault(name, []).append(row)


def _median(rounds: Sequence[Cost]) -> float:
    return statistics.median(cost.seconds for cost in rounds)
