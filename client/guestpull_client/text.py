"""Formats digests, sizes and untrusted text for a terminal."""

from __future__ import annotations

import sys
from typing import Final, TextIO

_SHORT_DIGEST: Final = 12


def one_line(text: str) -> str:
    r"""Make untrusted text one harmless line: write control characters as \x1b, \n and so on.

    Names, paths and messages of registries are untrusted.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal. Python sets a stream to None that was closed at start-up."""
    return stream is not None and stream.isatty()


def abbreviated(digest: str) -> str:
    """The first twelve digits of a digest, as docker shows it."""
    return digest.partition(":")[2][:_SHORT_DIGEST]


def short(digest: str) -> str:
    """A digest for standard output: abbreviated on a terminal, complete otherwise."""
    return abbreviated(digest) if is_terminal(sys.stdout) else digest


def size(size_bytes: int) -> str:
    """Format a number of bytes in powers of 1000, like docker."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.95:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
