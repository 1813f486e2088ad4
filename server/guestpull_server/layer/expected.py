"""Nodes of the expected tree: the files and directories that a layer's directory must have."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from typing import Final, TypeAlias

from guestpull_server.layer import whiteout
from guestpull_server.layer.refusals import TarError
from guestpull_server.layer.sparse import SparseMap

Xattrs: TypeAlias = dict[bytes, bytes]

ACCESS_ACL: Final = b"system.posix_acl_access"
DEFAULT_ACL: Final = b"system.posix_acl_default"
_NAMESPACES: Final = (b"user.", b"trusted.", b"security.")

_ACL_HEAD: Final = struct.Struct("<I")
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER_OBJ: Final = 0x01
_ACL_GROUP_OBJ: Final = 0x04
_ACL_MASK: Final = 0x10
_ACL_OTHER: Final = 0x20


class Node:
    """What files and directories have in common. `mode` includes the type."""

    __slots__ = ("gid", "mode", "mtime_ns", "uid", "xattrs")

    def __init__(self, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.xattrs: Xattrs | None = None

    @property
    def is_whiteout(self) -> bool:
        """Whether this is a whiteout of overlayfs."""
        return False

    def set_xattrs(self, xattrs: Iterable[tuple[bytes, bytes]]) -> None:
        """Set xattrs as setxattr(2) does: an access ACL sets the mode too, and is dropped if it says no more."""
        self.xattrs = self.xattrs or {}
        for name, value in xattrs:
            if name == ACCESS_ACL:
                self._set_access_acl(value)
            else:
                self.xattrs[name] = value

    def change_mode(self, permissions: int) -> None:
        """Set the mode as chmod(2) does: an access ACL follows."""
        self.mode = stat.S_IFMT(self.mode) | permissions
        acl = self.xattrs.get(ACCESS_ACL) if self.xattrs else None
        if acl is not None and self.xattrs is not None:
            self.xattrs[ACCESS_ACL] = _acl_with_mode(acl, permissions)

    def _set_access_acl(self, acl: bytes) -> None:
        assert self.xattrs is not None
        permissions, is_minimal = _mode_of_acl(acl)
        self.mode = self.mode & ~0o777 | permissions
        if is_minimal:
            self.xattrs.pop(ACCESS_ACL, None)
        else:
            self.xattrs[ACCESS_ACL] = acl


class Directory(Node):
    """A directory, and what is in it."""

    __slots__ = ("children", "name", "opaque", "parent")

    def __init__(
        self, parent: Directory | None, name: bytes, permissions: int, uid: int, gid: int, mtime_ns: int
    ) -> None:
        super().__init__(stat.S_IFDIR | permissions, uid, gid, mtime_ns)
        self.parent = parent
        self.name = name
        self.opaque = False
        self.children: dict[bytes, File | Directory] = {}

    @property
    def path(self) -> bytes:
        """The path relative to the root, which is b""."""
        names = []
        directory = self
        while directory.parent is not None:
            names.append(directory.name)
            directory = directory.parent
        return b"/".join(reversed(names))

    def expected_xattrs(self) -> Xattrs:
        """All xattrs that the directory must have, including overlayfs's."""
        opaque = {whiteout.OPAQUE_XATTR: whiteout.OPAQUE} if self.opaque else {}
        return (self.xattrs or {}) | opaque


class File(Node):
    """Anything but a directory. It may have several names; `directory` and `name` are one of them.

    `extra` is the target of a symbolic link, the numbers of a device, or the map of a sparse file.
    `is_stored` says that the tar stores bytes of its content.
    """

    Extra: TypeAlias = bytes | tuple[int, int] | SparseMap | None

    __slots__ = ("directory", "extra", "is_stored", "name", "other_names", "replaced_as", "size")

    def __init__(
        self,
        directory: Directory,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int,
        size: int,
        extra: Extra,
    ) -> None:
        super().__init__(mode, uid, gid, mtime_ns)
        self.directory = directory
        self.name = name
        self.size = size
        self.extra = extra
        self.other_names: list[tuple[Directory, bytes]] | None = None
        self.is_stored = False
        self.replaced_as = (
            -1
        )  # the number of its content among the replaced ones, once its last name is removed

    @property
    def is_whiteout(self) -> bool:
        """Whether this is a whiteout of overlayfs."""
        return stat.S_ISCHR(self.mode) and self.extra == (0, 0)

    @property
    def path(self) -> bytes:
        """One of its paths relative to the root."""
        above = self.directory.path
        return above + b"/" + self.name if above else self.name

    @property
    def links(self) -> int:
        """How many names it has."""
        return 1 + len(self.other_names or ())

    def add_name(self, directory: Directory, name: bytes) -> None:
        """Add a name."""
        self.other_names = [*(self.other_names or ()), (directory, name)]

    def remove_name(self, directory: Directory, name: bytes) -> bool:
        """Remove a name; True if it was the last one."""
        if not self.other_names:
            return True
        if self.directory is directory and self.name == name:
            self.directory, self.name = self.other_names.pop()
        else:
            self.other_names.remove((directory, name))
        return False


def supported_xattrs(xattrs: Iterable[tuple[bytes, bytes]], mode: int) -> list[tuple[bytes, bytes]]:
    """Those of the xattrs that the kernel accepts on a file of this type."""
    kind = stat.S_IFMT(mode)
    kept = []
    for name, value in xattrs:
        if name.startswith(b"user.") and kind not in (stat.S_IFREG, stat.S_IFDIR):
            continue
        if name.startswith(_NAMESPACES) or (name in (ACCESS_ACL, DEFAULT_ACL) and kind != stat.S_IFLNK):
            kept.append((name, value))
    return kept


def _mode_of_acl(acl: bytes) -> tuple[int, bool]:
    """The permissions that an access ACL gives a file, and whether the ACL says no more than that."""
    permissions = 0
    entries = _acl_entries(acl)
    has_mask = any(tag == _ACL_MASK for tag, _, _ in entries)
    for tag, allowed, _ in entries:
        if tag == _ACL_USER_OBJ:
            permissions |= (allowed & 7) << 6
        elif tag == (_ACL_MASK if has_mask else _ACL_GROUP_OBJ):
            permissions |= (allowed & 7) << 3
        elif tag == _ACL_OTHER:
            permissions |= allowed & 7
    return permissions, not has_mask and len(entries) <= 3


def _acl_with_mode(acl: bytes, permissions: int) -> bytes:
    """An access ACL after chmod(2)."""
    entries = _acl_entries(acl)
    has_mask = any(tag == _ACL_MASK for tag, _, _ in entries)
    shifts = {_ACL_USER_OBJ: 6, _ACL_MASK if has_mask else _ACL_GROUP_OBJ: 3, _ACL_OTHER: 0}
    changed = [
        _ACL_ENTRY.pack(tag, (permissions >> shifts[tag]) & 7 if tag in shifts else allowed, who)
        for tag, allowed, who in entries
    ]
    return acl[: _ACL_HEAD.size] + b"".join(changed)


def _acl_entries(acl: bytes) -> list[tuple[int, int, int]]:
    try:
        return list(_ACL_ENTRY.iter_unpack(acl[_ACL_HEAD.size :]))
    except struct.error:
        raise TarError("an ACL is malformed") from None
