"""Parses /proc/PID/mountinfo (proc(5)) of every mount namespace on the machine.

The list of a process has the mounts of its namespace that are below its root directory. Many processes share
both, so one list is read per pair of namespace and root directory. Processes that exit meanwhile are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

_SELF: Final = "self"
_MAX_ROOTS: Final = 8
"""Lists read per namespace: a container can give each of thousands of processes its own root directory."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Paths are those that the process whose list it is sees.

    Attributes:
        mount_id: unique among the machine's mounts at one time.
        parent_id: id of the mount that this one is mounted on.
        device: major:minor of the file system.
        root: the directory of the file system that is mounted.
        mount_point: the path at which it is mounted.
        peer_group: the `shared` peer group of the mount; empty if it is not shared.
        is_propagated_to: whether it receives mounts from a peer or a master.
        filesystem: the type of the file system.
        source: the mounted device or name.
        options: the file system's options, escaped.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    peer_group: str
    is_propagated_to: bool
    filesystem: str
    source: str
    options: bytes


class MountTable:
    """The lines of one mountinfo, parsed on request: parsing a line costs ten times as much as splitting."""

    def __init__(self, listing: bytes) -> None:
        self._lines: dict[int, bytes] = {}
        self._parents: dict[int, int] = {}
        for line in listing.splitlines():
            mount_id, parent_id, _ = line.split(b" ", 2)
            number = int(mount_id)
            self._lines[number] = line
            self._parents[number] = int(parent_id)

    def get(self, mount_id: int) -> Mount | None:
        """The mount with an id; None if this process does not see it."""
        line = self._lines.get(mount_id)
        return None if line is None else _mount(line)

    def with_text(self, text: bytes) -> list[Mount]:
        """The mounts whose lines contain a text."""
        return [_mount(line) for line in self._lines.values() if text in line]

    def mounted_on(self, parent_ids: Collection[int]) -> list[Mount]:
        """The mounts whose parents are among these."""
        return [_mount(self._lines[one]) for one, parent in self._parents.items() if parent in parent_ids]


@dataclass(frozen=True, slots=True)
class Namespace:
    """The mounts of a mount namespace that one process sees.

    Attributes:
        process: the id of the process; None for this process.
        mounts: the mounts in its mountinfo.
    """

    process: int | None
    mounts: MountTable


def own_mounts() -> MountTable:
    """Read the mounts that this process sees.

    Raises:
        OSError: /proc cannot be read.
    """
    return MountTable(_read(_SELF))


def namespaces_with(text: bytes, own_table: MountTable) -> Iterator[Namespace]:
    """Find the mount namespaces whose mountinfo contains a text; this process's comes first.

    Raises:
        OSError: /proc cannot be read.
    """
    own = _identity(_SELF)
    if own_table.with_text(text):
        yield Namespace(None, own_table)
    seen = {own}
    roots = {own[0]: 1}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with suppress(OSError):  # the process has exited
            identity = _identity(name)
            count = roots.get(identity[0], 0)
            if identity in seen or count == _MAX_ROOTS:
                continue
            seen.add(identity)
            roots[identity[0]] = count + 1
            listing = _read(name)
            if text in listing:
                yield Namespace(int(name), MountTable(listing))


def mount_id_of(descriptor: int) -> int:
    """The id of the mount through which an open file or directory was opened.

    Raises:
        OSError: /proc cannot be read.
    """
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file if b":" in line)
    return int(fields[b"mnt_id"])


def _identity(process: str) -> tuple[str, str]:
    """The namespace and the root directory of a process, equal for processes that see the same mounts."""
    # not stat(2), which could block: the root directory may be on a container's own FUSE file system
    return os.readlink(f"/proc/{process}/ns/mnt"), os.readlink(f"/proc/{process}/root")


def _read(process: str) -> bytes:
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        return file.read()


def _mount(line: bytes) -> Mount:
    head, _, tail = line.partition(b" - ")
    mount_id, parent_id, device, root, mount_point, _options, *optional = head.split(b" ")
    filesystem, source, options = tail.split(b" ", 2)
    shared = [field for field in optional if field.startswith(b"shared:")]
    return Mount(
        int(mount_id),
        int(parent_id),
        device.decode(),
        _unescaped(root),
        _unescaped(mount_point),
        shared[0].decode() if shared else "",
        bool(shared) or any(field.startswith(b"master:") for field in optional),
        _unescaped(filesystem),
        _unescaped(source),
        options,
    )


def _unescaped(field: bytes) -> str:
    r"""Decode a field of mountinfo, which writes space, tab, newline and backslash as `\ooo` (proc(5))."""
    head, *rest = field.split(b"\\")
    parts = [head]
    for part in rest:
        with suppress(ValueError):
            parts.append(bytes([int(part[:3], 8)]))
        parts.append(part[3:])
    return os.fsdecode(b"".join(parts))
