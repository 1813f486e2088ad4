"""Applies the entries of a tar in order: the rules that extraction and replay share.

    TarReader -> TarApplier: limits, parents, -> Extractor (extract.py): files in the root directory
                 whiteouts, types             -> Replay (replay.py): nodes of a tree in memory

Whatever makes a layer corrupt or too large for its content alone is decided here, so that a layer that cannot be
unpacked cannot be proved either. A subclass makes what an entry describes, in the directory that was entered.
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from typing import Any, Final

from guestpull_server.config import Limits
from guestpull_server.layer import tar_entry, whiteout
from guestpull_server.layer.directory_stack import DirectoryStack
from guestpull_server.layer.refusals import LayerLimitExceeded, ParentNotADirectory, TarError, shown
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_paths import clean, joined
from guestpull_server.layer.tar_reader import TarReader

_NO_ID: Final = 0xFFFFFFFF  # chown(2) takes it for "leave unchanged"
_MAJORS: Final = 1 << 12  # as Linux has them
_MINORS: Final = 1 << 20
_NOWHERE: Final = b"\0"  # not the parent of any entry
_NO_NAMES: Final = frozenset((b"", b".", b".."))
_NODE_TYPES: Final = {
    tar_entry.CHARACTER_DEVICE: stat.S_IFCHR,
    tar_entry.BLOCK_DEVICE: stat.S_IFBLK,
    tar_entry.FIFO: stat.S_IFIFO,
}


class TarApplier(ABC):
    """Applies the entries of one tar to a tree that is empty at first.

    Attributes:
        entries: how many entries were applied.
        size_bytes: the size of all files that were made, including those that later entries replaced.
    """

    def __init__(self, reader: TarReader, limits: Limits, directories: DirectoryStack[Any]) -> None:
        self._reader = reader
        self._limits = limits
        self._stack = directories
        self._max_path_bytes = limits.max_path_bytes
        self._parent = (
            _NOWHERE  # the parent of the previous entry as the tar spells it, if it is still current
        )
        self.entries = 0
        self.size_bytes = 0

    @property
    def implied_directories(self) -> tuple[bytes, ...]:
        """The paths of directories that were made without an entry of their own; the root is b""."""
        return tuple(self._stack.implied)

    def apply_all(self) -> None:
        """Apply all entries.

        Raises:
            TarError: the tar is malformed or cannot be unpacked.
            LayerLimitExceeded: the layer exceeds a limit.
            OSError: a system call failed; `filename` is the entry's path.
        """
        for entry in self._reader:
            self.entries += 1
            if self.entries > self._limits.max_layer_entries:
                what = "the number of entries"
                raise LayerLimitExceeded(what, "max_layer_entries", self._limits.max_layer_entries)
            try:
                self._apply(entry)
            except OSError as error:
                error.filename = entry.path
                raise

    # -- made by subclasses, in the current directory -------------------------------------------------------------

    @abstractmethod
    def _make_file(self, name: bytes, entry: Entry) -> None:
        """Make a regular file in place of whatever has this name."""

    @abstractmethod
    def _make_directory(self, name: bytes, entry: Entry) -> None:
        """Make a directory, or give one that exists the attributes of its entry."""

    @abstractmethod
    def _set_root_attributes(self, entry: Entry) -> None:
        """Give the root the attributes of its entry."""

    @abstractmethod
    def _make_symlink(self, name: bytes, entry: Entry) -> None:
        """Make a symbolic link in place of whatever has this name."""

    @abstractmethod
    def _make_hard_link(self, name: bytes, target: bytes) -> None:
        """Make a hard link to the file at an absolute path without links; FileNotFoundError if it has none.

        A name that is a link to this file already is left alone; anything else that has the name is replaced.
        """

    @abstractmethod
    def _make_node(self, name: bytes, entry: Entry, kind: int) -> None:
        """Make a device or a fifo, whose type is `kind`, in place of whatever has this name."""

    @abstractmethod
    def _make_opaque(self) -> None:
        """Hide what lower layers have in the current directory."""

    @abstractmethod
    def _make_whiteout(self, name: bytes) -> bool:
        """Hide what lower layers have under a name; whatever this layer has there stays.

        Returns whether this layer has a directory there, which is opaque then.
        """

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _allowed_xattrs(self, entry: Entry) -> list[tuple[bytes, bytes]]:
        """An entry's extended attributes without those by which a layer would control overlayfs."""
        allowed = []
        for name, value in entry.xattrs:
            if name.startswith(whiteout.OVERLAY_XATTRS):
                continue
            if len(value) > self._limits.max_xattr_bytes:
                what = "an extended attribute"
                raise LayerLimitExceeded(what, "max_xattr_bytes", self._limits.max_xattr_bytes)
            if not name or b"\0" in name:
                raise TarError(f"entry {shown(entry.path)} has an extended attribute without a name")
            allowed.append((name, value))
        return allowed

    def _look_up_parents_again(self) -> None:
        """Take note that something was removed: it may have been on the way to the current directory."""
        self._parent = _NOWHERE

    # -- the rules ------------------------------------------------------------------------------------------------

    def _apply(self, entry: Entry) -> None:
        path = entry.path
        if len(path) > self._max_path_bytes or len(entry.link_target) > self._max_path_bytes:
            raise LayerLimitExceeded("the length of a path", "max_path_bytes", self._max_path_bytes)
        parent, _, name = path.rpartition(b"/")
        # Most entries have the same parent as the previous one. Skipping the checks of their paths saves 0.7 of
        # the 4 us that Python takes for a file, beside 8 us of system calls.
        if parent != self._parent or name in _NO_NAMES:
            entered = self._enter_parent(path)
            if entered is None:
                return
            if entered == name:
                self._parent = parent
            name = entered
        if name[:4] == whiteout.PREFIX:
            self._apply_whiteout(name)
        elif entry.type == tar_entry.REGULAR and name:
            self.size_bytes += entry.size
            if self.size_bytes > self._limits.max_layer_bytes:
                what = "the unpacked layer"
                raise LayerLimitExceeded(what, "max_layer_bytes", self._limits.max_layer_bytes)
            if entry.uid or entry.gid:
                _check_owner(entry)
            self._make_file(name, entry)
        else:
            self._apply_other(name, entry)

    def _enter_parent(self, path: bytes) -> bytes | None:
        """Enter an entry's parent and return the entry's name in it; None if the entry is to be skipped."""
        parent, _, name = clean(path).rpartition(b"/")
        if parent.startswith(whiteout.AUFS_PREFIX) or b"/" + whiteout.AUFS_PREFIX in parent:
            return None
        is_whiteout = name[:4] == whiteout.PREFIX
        self._parent = (
            _NOWHERE  # if entering fails, the next entry must not take it for the current directory
        )
        try:
            self._stack.enter(parent, revive=not is_whiteout)
        except ParentNotADirectory:
            if is_whiteout:  # what lower layers have there is hidden anyway
                return None
            raise
        return name

    def _apply_other(self, name: bytes, entry: Entry) -> None:
        kind = entry.type
        if (entry.uid or entry.gid) and kind != tar_entry.HARD_LINK:
            _check_owner(entry)
        if kind == tar_entry.DIRECTORY:
            if name:
                self._make_directory(name, entry)
            else:
                self._set_root_attributes(entry)
        elif not name:
            raise TarError("the root of the layer is not a directory")
        elif kind == tar_entry.SYMLINK:
            if not entry.link_target:
                raise TarError(f"symbolic link {shown(entry.path)} has no target")
            self._make_symlink(name, entry)
        elif kind == tar_entry.HARD_LINK:
            self._apply_hard_link(name, entry)
        else:
            major, minor = entry.device
            if not (0 <= major < _MAJORS and 0 <= minor < _MINORS):
                raise TarError(f"device {shown(entry.path)} has numbers out of range")
            self._make_node(name, entry, _NODE_TYPES[kind])

    def _apply_hard_link(self, name: bytes, entry: Entry) -> None:
        # a hard link shares its target's inode, so the attributes of its own header mean nothing
        target = clean(entry.link_target)
        if target == joined(self._stack.path, name)[1:]:
            raise TarError(f"hard link {shown(entry.path)} leads to itself")
        parent, _, target_name = target.rpartition(b"/")
        try:
            self._make_hard_link(name, joined(self._stack.resolve(b"/" + parent), target_name))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            problem = f"the layer has no file {shown(entry.link_target)}"
            raise TarError(f"hard link {shown(entry.path)}: {problem}") from None

    def _apply_whiteout(self, name: bytes) -> None:
        if name == whiteout.OPAQUE_MARKER:
            self._make_opaque()
            return
        if name.startswith(whiteout.AUFS_PREFIX):
            return
        hidden = name[len(whiteout.PREFIX) :]
        if hidden in _NO_NAMES:
            raise TarError(f"whiteout {shown(name)} names nothing that could be gone")
        if self._make_whiteout(hidden):
            self._stack.no_longer_implied(joined(self._stack.path, hidden)[1:])


def _check_owner(entry: Entry) -> None:
    if not (0 <= entry.uid < _NO_ID and 0 <= entry.gid < _NO_ID):
        raise TarError(f"entry {shown(entry.path)} has an owner out of range")
