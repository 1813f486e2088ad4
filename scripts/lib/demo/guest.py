"""A guest's root filesystem."""

from __future__ import annotations

from pathlib import Path

from demo.stage import Stage


def tell(stage: Stage, layout: Path, kept: Path) -> None:
    """Tell it."""
    raise NotImplementedError
