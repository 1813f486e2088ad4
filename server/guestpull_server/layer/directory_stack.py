"""The directories from the layer's root to the parent of the current entry.

Extraction (`directories.py`) and replay (`replay.py`) enter an entry's parent by the same rules: missing
directories are made, symbolic links are followed below the root as containerd does, and both stay within the
same limits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Generic, TypeVar

from guestpull_server.config import Limits
from guestpull_server.layer.refusals import LayerLimitExceeded, ParentNotADirectory, shown
from guestpull_server.layer.tar_paths import follow_links, joined

_Directory = TypeVar("_Directory")


class Obstacle(Enum):
    """What is found where a directory is needed."""

    MISSING = auto()
    SYMLINK = auto()
    WHITEOUT = auto()
    OTHER = auto()


class DirectoryStack(ABC, Generic[_Directory]):
    """A stack of open directories; the last one is current.

    Attributes:
        path: the absolute path of the current directory.
        current: the current directory.
        implied: paths of the directories that were made without an entry of their own, in order. The root is b"".
    """

    def __init__(self, limits: Limits, root: _Directory) -> None:
        self._limits = limits
        self._stack = [(b"/", root)]
        self.path, self.current = self._stack[0]
        self._implied_bytes = 0
        self.implied: dict[bytes, None] = {b"": None}

    def enter(self, parent: bytes, *, revive: bool) -> None:
        """Make a directory the current one.

        Args:
            parent: a clean path relative to the root.
            revive: also make directories in place of whiteouts.

        Raises:
            ParentNotADirectory: something on the way is neither a directory nor a link to one.
            TarError: the path leads through too many links.
            LayerLimitExceeded: the directory is too deep, or too many directories had to be made.
        """
        wanted = b"/" + parent
        if not self._descend(wanted, revive):
            entered = self._descend(self.resolve(wanted), revive)
            assert entered, "a resolved path leads through no links"

    def resolve(self, path: bytes) -> bytes:
        """Follow all symbolic links in an absolute path; see `follow_links`."""
        if (self.path + b"/").startswith(
            path + b"/"
        ):  # an ancestor of the current directory, whose path is real
            return path
        return follow_links(path, self._read_link, self._limits.max_path_bytes)

    def no_longer_implied(self, path: bytes) -> None:
        """Take note that a directory has an entry now, or is gone. The path is relative to the root."""
        self.implied.pop(path, None)

    @abstractmethod
    def _open(self, name: bytes) -> _Directory | Obstacle:
        """Open the directory that has this name in the current directory."""

    @abstractmethod
    def _make(self, name: bytes) -> _Directory:
        """Make and open a directory without an entry in the current directory."""

    @abstractmethod
    def _replace_whiteout(self, name: bytes) -> _Directory:
        """The same in place of a whiteout: what lower layers have there stays hidden."""

    @abstractmethod
    def _read_link(self, path: bytes) -> bytes | None:
        """The target of a symbolic link; None if there is no link at this absolute path."""

    def _pop_to(self, depth: int) -> None:
        del self._stack[depth:]
        self.path, self.current = self._stack[-1]

    def _descend(self, wanted: bytes, revive: bool) -> bool:
        """Enter a path by its components; False if one of them is a symbolic link."""
        kept = len(self._stack)
        while kept > 1 and not (wanted + b"/").startswith(self._stack[kept - 1][0] + b"/"):
            kept -= 1
        if kept < len(self._stack):
            self._pop_to(kept)
        for name in wanted[len(self.path) :].split(b"/"):
            if name and not self._enter_child(name, revive):
                return False
        return True

    def _enter_child(self, name: bytes, revive: bool) -> bool:
        path = joined(self.path, name)
        found = self._open(name)
        if isinstance(found, Obstacle):
            if found is Obstacle.SYMLINK:
                return False
            found = self._make_implied(name, path, found, revive)
        limits = self._limits
        if len(self._stack) > limits.max_path_depth:
            raise LayerLimitExceeded("the depth of a path", "max_path_depth", limits.max_path_depth)
        if len(path) > limits.max_path_bytes:
            raise LayerLimitExceeded("the length of a path", "max_path_bytes", limits.max_path_bytes)
        self._stack.append((path, found))
        self.path, self.current = path, found
        return True

    def _make_implied(self, name: bytes, path: bytes, found: Obstacle, revive: bool) -> _Directory:
        if found is not Obstacle.MISSING and not (found is Obstacle.WHITEOUT and revive):
            raise ParentNotADirectory(f"{shown(path)} is not a directory, but has entries")
        limits = self._limits
        self._implied_bytes += len(path)
        if len(self.implied) > limits.max_implied_directories:
            what = "the number of directories without an entry"
            raise LayerLimitExceeded(what, "max_implied_directories", limits.max_implied_directories)
        if self._implied_bytes > limits.max_implied_path_bytes:
            what = "the paths of directories without an entry"
            raise LayerLimitExceeded(what, "max_implied_path_bytes", limits.max_implied_path_bytes)
        if found is Obstacle.WHITEOUT:
            # it hides what lower layers have, so that there are no attributes to inherit: it is not implied
            return self._replace_whiteout(name)
        self.implied[path[1:]] = None
        return self._make(name)
