"""Mounts as the kernel lists them, in every mount namespace of the machine: /proc/PID/mountinfo (proc(5)).

A process sees those mounts of its namespace that are below its root directory. One list is read for each pair
of namespace and root directory, because many processes share both. Processes end while this is read; what
cannot be read is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

_SELF: Final = "self"
_MOST_ROOTS: Final = 8
"""Lists read for one namespace: a container can give each of thousands of processes a root of its own."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Paths are as the process sees them that the list was read for.

    Attributes:
        mount_id: unique among the mounts of the machine at one time.
        parent_id: of the mount that this one is mounted on.
        device: major:minor of the file system.
        root: the directory of the file system that is mounted.
        mount_point: where it is mounted.
        peer_group: the `shared` peer group of the mount; empty if it is not shared.
        is_propagated_to: mounts are propagated to it, from a peer or from a master.
        filesystem: its type.
        source: what was mounted.
        options: of the file system, escaped.
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
    """One mountinfo. Only the lines that are asked for are parsed: a parsed line costs ten unparsed ones."""

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
    """What one process sees of its mount namespace.

    Attributes:
        process: its id; None for this process.
        mounts: its mountinfo.
    """

    process: int | None
    mounts: MountTable


def own_mounts() -> MountTable:
    """The mounts that this process sees.

    Raises:
        OSError: /proc cannot be read.
    """
    return MountTable(_read(_SELF))


def namespaces_with(text: bytes, own_table: MountTable) -> Iterator[Namespace]:
    """The mount namespaces of the machine in whose mountinfo a text occurs; this process's comes first.

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
        with suppress(OSError):  # the process has ended
            identity = _identity(name)
            count = roots.get(identity[0], 0)
            if identity in seen or count == _MOST_ROOTS:
                continue
            seen.add(identity)
            roots[identity[0]] = count + 1
            listing = _read(name)
            if text in listing:
                yield Namespace(int(name), MountTable(listing))


def mount_id_of(descriptor: int) -> int:
    """The id of the mount that an open file or directory was reached by.

    Raises:
        OSError: /proc cannot be read.
    """
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
        fields = dict(line.split(b":", 1) for line in file if b":" in line)
    return int(fields[b"mnt_id"])


def _identity(process: str) -> tuple[str, str]:
    """The namespace and the root directory of a process: equal for processes that see the same mounts."""
    # stat(2) would ask the root directory's file system, which may be a container's own, and never answer
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
    r"""A field of mountinfo, which writes space, tab, newline and backslash as `\ooo` (proc(5))."""
    head, *rest = field.split(b"\\")
    parts = [head]
    for part in rest:
        with suppress(ValueError):
            parts.append(bytes([int(part[:3], 8)]))
        parts.append(part[3:])
    return os.fsdecode(b"".join(parts))
