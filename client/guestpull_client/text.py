"""Digests, sizes and foreign text, as a terminal shows them."""

from __future__ import annotations

import sys
from typing import Final, TextIO

_SHORT_DIGEST: Final = 12


def one_line(text: str) -> str:
    r"""Text of whatever origin as one harmless line: what a terminal would obey is written as \x1b, \n and so on.

    Names, paths and what registries answer come from outside.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream leads to a terminal; one that was closed before we came is None."""
    return stream is not None and stream.isatty()


def abbreviated(digest: str) -> str:
    """A digest as people say it: the first twelve digits."""
    return digest.partition(":")[2][:_SHORT_DIGEST]


def short(digest: str) -> str:
    """A digest for standard output: abbreviated on a terminal, and whole for a program that reads it."""
    return abbreviated(digest) if is_terminal(sys.stdout) else digest


def size(size_bytes: int) -> str:
    """Bytes for people, in powers of 1000 as disks and docker count."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.95:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
