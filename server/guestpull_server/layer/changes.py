"""Differences between a layer and its directory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ChangeKind(Enum):
    """What differs."""

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
        path: the path within the layer; b"" for its root, and for the layer as a whole.
        kind: what differs.
        detail: what was found and what was expected.
    """

    path: bytes
    kind: ChangeKind
    detail: str

    def __str__(self) -> str:
        where = self.path.decode(errors="backslashreplace") or "/"
        return f"{where}: {self.kind.value}: {self.detail}"


class TooManyChanges(Exception):
    """Enough differences were found; more would tell nothing."""


class Changes:
    """The differences found so far, at most `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.found: list[Change] = []

    def add(self, path: bytes, kind: ChangeKind, detail: str) -> None:
        """Add a difference.

        Raises:
            TooManyChanges: there are `most` of them now.
        """
        self.found.append(Change(path, kind, detail))
        if len(self.found) >= self._most:
            raise TooManyChanges
