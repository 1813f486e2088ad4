"""Exceptions for layers that are refused."""

from __future__ import annotations


class TarError(Exception):
    """The tar is malformed or cannot be unpacked. The message becomes CorruptLayer's `problem`."""


class ParentNotADirectory(TarError):
    """The parent of an entry is neither a directory nor a link to one."""


class LayerLimitExceeded(Exception):
    """The layer exceeds a field of `Limits`.

    Attributes:
        what: what is too large or too many.
        limit: the field's name.
        allowed: the field's value.
    """

    def __init__(self, what: str, limit: str, allowed: int) -> None:
        super().__init__(what, limit, allowed)
        self.what = what
        self.limit = limit
        self.allowed = allowed


def shown(path: bytes) -> str:
    """A path as error messages quote it."""
    return repr(path[:300].decode(errors="backslashreplace"))
