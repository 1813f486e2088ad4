"""Where the extraction stands, and which times the directories around it must get back.

The worker's current directory is always the parent of the entry at hand, so that an entry is made by its
bare name: the kernel walks no path, and no name can lead elsewhere. The directories from the root to there
are a stack. Making an entry changes its parent's mtime; a directory remembers on the stack what it was, and
gets it back when the extraction leaves it. So only the directories on the way are remembered, however many a
layer has.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer.tar_fields import TarError
from guestpull_server.layer.whiteout import is_whiteout, make_opaque
from guestpull_server.layer.worker_protocol import LayerLimitExceeded

IMPLIED_MODE: Final = 0o755
_MAX_LINKS: Final = 255  # on the way to one entry, as containerd allows
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")


class ParentNotADirectory(TarError):
    """What is to be a directory is something else in this layer."""


@dataclass(slots=True)
class _OpenDirectory:
    path: bytes  # absolute: the root is the layer's
    atime_ns: int
    mtime_ns: int
    inherits_group: bool  # setgid: what is made here belongs to the directory's group


class Directories:
    """The stack of directories from the layer's root to the current one.

    Until the root has an entry it is as all directories without one: the same layer makes the same directory,
    whenever and wherever it is unpacked. A work directory with a default ACL, or setgid, has nothing to hand down.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stack: list[_OpenDirectory] = []
        drop_inherited_acls(b"/")
        os.chown(b"/", 0, 0)
        os.chmod(b"/", IMPLIED_MODE)
        self._push(b"/", os.lstat(b"/"))
        self.set_times(0, 0)
        self._implied_bytes = 0
        self.implied: dict[bytes, None] = {b"": None}
        """Directories made without an entry, in their order; the root is b""."""
        self.inherits_acl = False
        """Whether a directory has a default ACL, which the kernel gives to what is made in it."""

    @property
    def path(self) -> bytes:
        """The current directory, absolute."""
        return self._stack[-1].path

    @property
    def inherits_group(self) -> bool:
        """Whether what is made here takes over the directory's group."""
        return self._stack[-1].inherits_group

    def enter(self, parent: bytes, *, revive: bool) -> None:
        """Make `parent` (relative to the root, without `.` or `..`) the current directory.

        Missing directories are made. Symbolic links on the way are followed, within the layer's root, as
        containerd does.

        Args:
            parent: the path.
            revive: make directories also of what the layer says is gone.

        Raises:
            ParentNotADirectory: something on the way is neither a directory nor a link to one.
            TarError: links lead on and on.
            LayerLimitExceeded: it lies too deep, or too many directories had to be made.
        """
        wanted = b"/" + parent
        self._leave_all_but_ancestors_of(wanted)
        base = self._stack[-1].path
        for name in wanted[len(base) :].split(b"/"):
            if name and not self._enter_child(name, revive):
                self._enter_resolved(self._resolved(wanted), revive)
                return

    def leave_all(self) -> None:
        """Give every directory on the stack its times back."""
        while self._stack:
            self._pop()

    def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times that the current directory gets when it is left."""
        self._stack[-1].atime_ns = atime_ns
        self._stack[-1].mtime_ns = mtime_ns

    def refresh_mode(self) -> None:
        """Take notice of a mode that the current directory was given."""
        self._stack[-1].inherits_group = bool(os.lstat(b".").st_mode & stat.S_ISGID)

    def _enter_resolved(self, path: bytes, revive: bool) -> None:
        self._leave_all_but_ancestors_of(path)
        for name in path[len(self._stack[-1].path) :].split(b"/"):
            if name:
                entered = self._enter_child(name, revive)
                assert entered, "a resolved path leads through no links"

    def _resolved(self, path: bytes) -> bytes:
        """Follow all links on the way; what is missing there is a directory that is yet to be made."""
        resolved = b""
        names = path.split(b"/")[::-1]
        links = 0
        while names:
            name = names.pop()
            if name == b"..":
                resolved = resolved.rpartition(b"/")[0]
                continue
            if name in (b"", b"."):
                continue
            further = resolved + b"/" + name
            if len(further) > self._limits.max_path_bytes:
                raise self._path_too_long()
            try:
                target = os.readlink(further)
            except OSError:  # no link, or nothing
                resolved = further
                continue
            links += 1
            if links > _MAX_LINKS:
                raise TarError(
                    f"{path[:300].decode(errors='backslashreplace')!r} leads through more than {_MAX_LINKS} links"
                )
            if target.startswith(b"/"):
                resolved = b""
            names += target.split(b"/")[::-1]
        return resolved or b"/"

    def _path_too_long(self) -> LayerLimitExceeded:
        return LayerLimitExceeded("the length of a path", "max_path_bytes", self._limits.max_path_bytes)

    def _leave_all_but_ancestors_of(self, wanted: bytes) -> None:
        left = False
        while len(self._stack) > 1:
            top = self._stack[-1].path
            if wanted == top or wanted.startswith(top + b"/"):
                break
            self._pop()
            left = True
        if left:
            os.chdir(self._stack[-1].path)

    def _enter_child(self, name: bytes, revive: bool) -> bool:
        """Descend into a child, which is made if it is missing; False if it is a symbolic link."""
        parent = self._stack[-1].path
        path = parent + name if parent == b"/" else parent + b"/" + name
        try:
            status = os.lstat(name)
        except FileNotFoundError:
            status = self._make_implied(name, path)
        if stat.S_ISLNK(status.st_mode):
            return False
        if is_whiteout(status) and revive:
            os.unlink(name)
            status = self._make_implied(name, path)
            make_opaque(name)
            # what lower layers have there is hidden, so that there are no attributes to be inherited
            self.implied.pop(path[1:], None)
        elif not stat.S_ISDIR(status.st_mode):
            raise ParentNotADirectory(
                f"{path.decode(errors='backslashreplace')!r} is not a directory, but has entries"
            )
        limits = self._limits
        if len(self._stack) > limits.max_path_depth:
            raise LayerLimitExceeded("the depth of a path", "max_path_depth", limits.max_path_depth)
        if len(path) > limits.max_path_bytes:
            raise self._path_too_long()
        os.chdir(name)
        self._push(path, status)
        return True

    def _make_implied(self, name: bytes, path: bytes) -> os.stat_result:
        limits = self._limits
        self._implied_bytes += len(path)
        if len(self.implied) > limits.max_implied_directories:
            raise LayerLimitExceeded(
                "the number of directories without an entry",
                "max_implied_directories",
                limits.max_implied_directories,
            )
        if self._implied_bytes > limits.max_implied_path_bytes:
            raise LayerLimitExceeded(
                "the paths of directories without an entry",
                "max_implied_path_bytes",
                limits.max_implied_path_bytes,
            )
        os.mkdir(name, IMPLIED_MODE)
        if self.inherits_acl:
            drop_inherited_acls(name)
        if self.inherits_group or self.inherits_acl:
            os.chown(name, 0, 0)
            os.chmod(name, IMPLIED_MODE)
        os.utime(name, ns=(0, 0))
        self.implied[path[1:]] = None
        return os.lstat(name)

    def _push(self, path: bytes, status: os.stat_result) -> None:
        setgid = bool(status.st_mode & stat.S_ISGID)
        self._stack.append(_OpenDirectory(path, status.st_atime_ns, status.st_mtime_ns, setgid))

    def _pop(self) -> None:
        left = self._stack.pop()
        os.utime(left.path, ns=(left.atime_ns, left.mtime_ns))


def drop_inherited_acls(name: int | bytes) -> None:
    """Take from what was just made the ACLs that it has of its parent; the tar says what it is to have."""
    for acl in _ACLS:
        with suppress(OSError):  # it has none, or the file system knows none
            os.removexattr(name, acl)
