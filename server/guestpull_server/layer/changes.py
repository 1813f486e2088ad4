"""How a layer's directory may differ from the layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ChangeKind(Enum):
    """What of a file, a directory, or a record is not as it was."""

    MISSING = "missing"
    EXTRA = "extra"
    TYPE = "type"
    CONTENT = "content"
    SIZE = "size"
    MODE = "mode"
    OWNER = "owner"
    TIME = "time"
    LINK_TARGET = "link target"
    HARD_LINKS = "hard links"
    DEVICE = "device"
    XATTR = "xattr"
    TAR_SPLIT = "tar-split"
    DIFF_ID = "diff_id"
    IMPLIED = "directories without an entry"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference.

    Attributes:
        path: within the layer, b"" for its root, and for what concerns all of it.
        kind: what differs.
        detail: what is there, and what belongs there.
    """

    path: bytes
    kind: ChangeKind
    detail: str

    def __str__(self) -> str:
        where = self.path.decode(errors="backslashreplace") or "/"
        return f"{where}: {self.kind.value}: {self.detail}"


class TooManyChanges(Exception):
    """Enough was found to say that the directory is not the layer."""


class Changes:
    """Those that were found so far; no more than `most` are kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.found: list[Change] = []

    def add(self, path: bytes, kind: ChangeKind, detail: str) -> None:
        """Note one.

        Raises:
            TooManyChanges: there are so many that more would tell nothing.
        """
        self.found.append(Change(path, kind, detail))
        if len(self.found) >= self._most:
            raise TooManyChanges
