"""Draws a run's cold pulls by each contender beside guestpulld's and the bound, as an SVG file.

One panel for each codec that was measured. A bar is the median wall-clock time; the line on it spans from the
fastest to the slowest round. matplotlib is loaded only for a chart: it is in the dependency group
`chart`, which `scripts/bench` installs then.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.place import Refusal
from bench.report import Figure

_BOUND: Final = "the bound"
_OURS: Final = "guestpulld"
_COLORS: Final = {_OURS: "#1f6feb", _BOUND: "#57606a"}
_PEERS_COLOR: Final = "#afb8c1"
_INCHES_A_PANEL: Final = 3.4
_INCHES_HIGH: Final = 2.8
_CAPTION_LETTERS_A_PANEL: Final = 60


@dataclass(frozen=True, slots=True)
class _Panel:
    codec: str
    seconds: Mapping[str, Sequence[float]]
    """Of each contender, and of the bound."""


def draw(figures: Sequence[Figure], cores: int, caption: str, path: Path) -> None:
    """Draw the cold pulls that are among the figures.

    Args:
        figures: of a run.
        cores: over how many the bound's CPU seconds are spread.
        caption: what the machine and the date were.
        path: the SVG file; replaced if it exists.

    Raises:
        Refusal: no cold pull was measured, or matplotlib is not installed.
    """
    panels = _panels(figures, cores)
    if not panels:
        raise Refusal("--chart draws cold pulls, and none was measured. Add cold-gzip to --only.")
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise Refusal("--chart needs matplotlib. Install it: .venv/bin/pip install --group chart") from None
    canvas = Canvas(figsize=(_INCHES_A_PANEL * len(panels), _INCHES_HIGH), layout="constrained")
    for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = list(panel.seconds)
        medians = [statistics.median(values) for values in panel.seconds.values()]
        below = [median - min(values) for median, values in zip(medians, panel.seconds.values(), strict=True)]
        above = [max(values) - median for median, values in zip(medians, panel.seconds.values(), strict=True)]
        bars = axes.barh(
            names,
            medians,
            xerr=[below, above],
            color=[_COLORS.get(name, _PEERS_COLOR) for name in names],
            error_kw={"elinewidth": 0.8},
        )
        axes.bar_label(bars, labels=[f"{median:.2f} s" for median in medians], padding=4, fontsize=8)
        axes.set_title(f"cold pull, {panel.codec}", fontsize=10)
        axes.set_xlabel("seconds, median of the rounds", fontsize=8)
        axes.set_xlim(0, max(medians) * 1.3)
        axes.tick_params(labelsize=8)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    wrapped = textwrap.fill(caption, _CAPTION_LETTERS_A_PANEL * len(panels))
    canvas.supxlabel(wrapped, fontsize=7, color="#57606a")
    # no date and no random ids: the same figures give the same file
    canvas.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _panels(figures: Sequence[Figure], cores: int) -> list[_Panel]:
    seconds: dict[str, dict[str, Sequence[float]]] = {}
    for figure in figures:
        if not figure.row.startswith("cold-"):
            continue
        panel = seconds.setdefault(figure.row.removeprefix("cold-"), {})
        if figure.unit == "s":
            panel[figure.subject] = figure.values
        elif figure.subject == f"{_BOUND}, total":
            panel[_BOUND] = [value / cores for value in figure.values]
    return [_Panel(codec, contenders) for codec, contenders in seconds.items()]
