"""The directory stack of the extraction.

The worker's current directory is always the parent of the entry that is being made, so an entry is made by its
bare name: the kernel walks no path, and no name can lead elsewhere. Making an entry changes its parent's mtime.
The stack remembers the times of each directory and restores them when the extraction leaves it, so only the
directories on the way are remembered, however many a layer has.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer.directory_stack import DirectoryStack, Obstacle
from guestpull_server.layer.whiteout import is_whiteout, make_opaque

IMPLIED_MODE: Final = 0o755
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")


@dataclass(slots=True)
class _OpenDirectory:
    atime_ns: int
    mtime_ns: int
    inherits_group: bool  # setgid: new files get the directory's group


class Directories(DirectoryStack[_OpenDirectory]):
    """The stack of directories from the process's root directory to its current directory.

    Until the root has an entry, it is like any other directory without one, whatever default ACL, group or setgid
    bit the work directory has: the same layer always makes the same directory.

    Attributes:
        inherits_acl: whether some directory has a default ACL, which the kernel applies to new files in it.
    """

    def __init__(self, limits: Limits) -> None:
        drop_inherited_acls(b"/")
        os.chown(b"/", 0, 0)
        os.chmod(b"/", IMPLIED_MODE)
        super().__init__(limits, _OpenDirectory(0, 0, inherits_group=False))
        self.inherits_acl = False

    @property
    def inherits_group(self) -> bool:
        """Whether new files in the current directory get the directory's group."""
        return self.current.inherits_group

    def leave_all(self) -> None:
        """Restore the times of every directory on the stack."""
        self._leave(0)

    def root_has_entry(self, atime_ns: int, mtime_ns: int) -> None:
        """Take note of the root's entry while the root is current: its times, and the mode that was just set."""
        root = self.current
        root.atime_ns, root.mtime_ns = atime_ns, mtime_ns
        root.inherits_group = bool(os.lstat(b"/").st_mode & stat.S_ISGID)
        self.no_longer_implied(b"")

    def _open(self, name: bytes) -> _OpenDirectory | Obstacle:
        try:
            status = os.lstat(name)
        except FileNotFoundError:
            return Obstacle.MISSING
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            os.chdir(name)
            return _OpenDirectory(status.st_atime_ns, status.st_mtime_ns, bool(mode & stat.S_ISGID))
        if stat.S_ISLNK(mode):
            return Obstacle.SYMLINK
        return Obstacle.WHITEOUT if is_whiteout(status) else Obstacle.OTHER

    def _make(self, name: bytes) -> _OpenDirectory:
        os.mkdir(name, IMPLIED_MODE)
        if self.inherits_acl:
            drop_inherited_acls(name)
        if self.inherits_group or self.inherits_acl:
            os.chown(name, 0, 0)
            os.chmod(name, IMPLIED_MODE)
        os.chdir(name)
        return _OpenDirectory(0, 0, inherits_group=False)

    def _replace_whiteout(self, name: bytes) -> _OpenDirectory:
        os.unlink(name)
        made = self._make(name)
        make_opaque(b".")
        return made

    def _read_link(self, path: bytes) -> bytes | None:
        try:
            status = os.lstat(path)
        except OSError:
            return None
        return os.readlink(path) if stat.S_ISLNK(status.st_mode) else None

    def _pop_to(self, depth: int) -> None:
        self._leave(depth)
        self.path, self.current = self._stack[-1]
        os.chdir(self.path)

    def _leave(self, depth: int) -> None:
        while len(self._stack) > depth:
            path, directory = self._stack.pop()
            os.utime(path, ns=(directory.atime_ns, directory.mtime_ns))


def drop_inherited_acls(name: int | bytes) -> None:
    """Remove the ACLs that a new file got from its parent's default ACL."""
    for acl in _ACLS:
        with suppress(OSError):  # there is none, or the file system does not support them
            os.removexattr(name, acl)
