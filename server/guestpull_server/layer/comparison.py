"""Compares the directory of a layer with the tree that is expected, attribute by attribute."""

from __future__ import annotations

import os
import stat
from typing import Final

from guestpull_server.layer import whiteout
from guestpull_server.layer.changes import ChangeKind, Changes
from guestpull_server.layer.expected import Directory, File, Node, Xattrs
from guestpull_server.layer.stored_content import is_hole
from guestpull_server.layer.tar_fields import NANOSECONDS
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.unpacked_tree import OPEN_FILE, UnpackedTree, list_xattrs, names_in

_IGNORED_XATTRS: Final = frozenset({b"security.selinux"})  # set by the machine
_MAY_HAVE_WHITEOUTS: Final = (whiteout.HAS_WHITEOUTS_XATTR, whiteout.HAS_WHITEOUTS)
"""Only changes how a directory is listed; layers of other programs do not have it."""
_NOTHING: Final[Xattrs] = {}
_SQUASHFS_SECONDS: Final = 1 << 32  # squashfs keeps times modulo this
_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class Comparison:
    """Compares expected nodes with what is in the directory, and collects the differences."""

    def __init__(self, tree: UnpackedTree, changes: Changes) -> None:
        self._tree = tree
        self._changes = changes
        self._is_squashfs = tree.is_squashfs
        self._inodes: dict[File, tuple[int, int]] = {}  # of files with several names
        self._directory: Directory | None = None  # the directory that is entered, and its descriptor
        self._descriptor: int | None = None

    def directory(self, expected: Directory, path: bytes, descriptor: int) -> None:
        """Compare an open directory, and the names in it."""
        self._directory, self._descriptor = expected, descriptor
        self._attributes(path, expected, os.fstat(descriptor))
        self._xattrs(path, expected.expected_xattrs(), self._tree.xattrs_of(descriptor))
        found = set(names_in(descriptor))
        if found == expected.children.keys():
            return
        for name in sorted(found - expected.children.keys()):
            self._changes.add(joined(path, name), ChangeKind.EXTRA, "the layer has no such name")
        for name in sorted(expected.children.keys() - found):
            if not isinstance(expected.children[name], Directory):
                self._changes.add(joined(path, name), ChangeKind.MISSING, "it is not there")

    def file(self, expected: File, descriptor: int) -> None:
        """Compare anything but a directory whose content need not be hashed; `descriptor` is its directory's."""
        name, path = expected.name, expected.path
        status = self._tree.status(descriptor, name)
        if status is None:
            return  # `directory` reported it
        if not self._attributes(path, expected, status):
            return
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFLNK:
            target = os.fsencode(os.readlink(name, dir_fd=descriptor))
            if target != expected.extra:
                self._differs(path, ChangeKind.LINK_TARGET, target, expected.extra)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
            if device != expected.extra:
                self._differs(path, ChangeKind.DEVICE, device, expected.extra)
        elif kind == stat.S_IFREG and expected.size == status.st_size and expected.size:
            self._hole(path, expected, descriptor, name)
        self._xattrs(path, expected.xattrs or _NOTHING, self._tree.xattrs(descriptor, name))

    def name(self, expected: File, directory: Directory, name: bytes, descriptor: int) -> None:
        """Check that one of several names of a file leads to the same file as its other names."""
        status = self._tree.status(descriptor, name)
        if status is None:
            return
        found = (status.st_dev, status.st_ino)
        if self._inodes.setdefault(expected, found) != found:
            detail = f"it is another file than {expected.path.decode(errors='backslashreplace')}"
            self._changes.add(joined(directory.path, name), ChangeKind.HARD_LINKS, detail)

    def open(self, expected: File) -> int:
        """Compare a file and open it to read its content; -1 if there is no such file."""
        if expected.directory is not self._directory:
            self._directory = expected.directory
            self._descriptor = self._tree.enter(expected.directory.path)
        directory, name = self._descriptor, expected.name
        if directory is None:
            return -1
        # `status` and the check of attributes are inlined: a tenth of the time that a small file takes
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return -1
        if not (
            status.st_mode == expected.mode
            and status.st_size == expected.size
            and status.st_mtime_ns == expected.mtime_ns
            and status.st_uid == expected.uid
            and status.st_gid == expected.gid
            and status.st_nlink == 1
            and expected.other_names is None
        ) and not self._attributes(expected.path, expected, status):
            return -1
        descriptor = os.open(name, OPEN_FILE, dir_fd=directory)
        if list_xattrs(descriptor) or expected.xattrs:
            xattrs = self._tree.xattrs_of(descriptor)
            self._xattrs(expected.path, expected.xattrs or _NOTHING, xattrs)
        return descriptor

    def _attributes(self, path: bytes, expected: Node, status: os.stat_result) -> bool:
        """Compare what stat(2) returns; False if the type differs."""
        kind, wanted = stat.S_IFMT(status.st_mode), stat.S_IFMT(expected.mode)
        if kind != wanted:
            self._differs(path, ChangeKind.TYPE, _KINDS.get(kind, "?"), _KINDS[wanted])
            return False
        if status.st_mode != expected.mode:
            self._differs(path, ChangeKind.MODE, _octal(status.st_mode), _octal(expected.mode))
        if (status.st_uid, status.st_gid) != (expected.uid, expected.gid):
            found = f"{status.st_uid}:{status.st_gid}"
            self._differs(path, ChangeKind.OWNER, found, f"{expected.uid}:{expected.gid}")
        if not self._is_same_time(status.st_mtime_ns, expected.mtime_ns):
            self._differs(path, ChangeKind.TIME, status.st_mtime_ns, expected.mtime_ns)
        if isinstance(expected, File):
            if kind == stat.S_IFREG and status.st_size != expected.size:
                self._differs(path, ChangeKind.SIZE, status.st_size, expected.size)
            if status.st_nlink != expected.links:
                self._differs(path, ChangeKind.HARD_LINKS, status.st_nlink, expected.links)
        return True

    def _is_same_time(self, found_ns: int, expected_ns: int) -> bool:
        if self._is_squashfs:
            return (found_ns // NANOSECONDS - expected_ns // NANOSECONDS) % _SQUASHFS_SECONDS == 0
        return found_ns == expected_ns

    def _hole(self, path: bytes, expected: File, descriptor: int, name: bytes) -> None:
        file = os.open(name, OPEN_FILE, dir_fd=descriptor)
        try:
            if not is_hole(file, 0, expected.size):
                self._changes.add(path, ChangeKind.CONTENT, "its holes are not empty")
        finally:
            os.close(file)

    def _xattrs(self, path: bytes, expected: Xattrs, found: Xattrs) -> None:
        if found == expected:
            return
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name) and not (
                name not in expected
                and (name in _IGNORED_XATTRS or (name, found[name]) == _MAY_HAVE_WHITEOUTS)
            ):
                what = name.decode(errors="backslashreplace")
                detail = f"{what} is {_shown(found.get(name))}, not {_shown(expected.get(name))}"
                self._changes.add(path, ChangeKind.XATTR, detail)

    def _differs(self, path: bytes, kind: ChangeKind, found: object, expected: object) -> None:
        self._changes.add(path, kind, f"it is {found}, not {expected}")


def _octal(mode: int) -> str:
    return f"{stat.S_IMODE(mode):04o}"


def _shown(value: bytes | None) -> str:
    return "absent" if value is None else repr(value[:40])
