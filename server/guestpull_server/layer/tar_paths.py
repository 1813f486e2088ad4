"""Paths within a layer: cleaned, joined, and resolved below the layer's root."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestpull_server.layer.refusals import LayerLimitExceeded, TarError, shown

MAX_LINKS: Final = 255  # symbolic links on the way to one path; containerd's limit


def clean(path: bytes) -> bytes:
    """Normalize a path from a tar: relative to the layer's root, without `.`, `..` and redundant slashes.

    `..` at the root stays at the root, as in a chroot and as Go's filepath.Join("/", path) does.
    """
    if path[:2] == b"./":
        path = path[2:]
    path = path.rstrip(b"/")
    if path[:1] not in (b"/", b".") and b"//" not in path and b"/." not in path:
        return path
    kept: list[bytes] = []
    for component in path.split(b"/"):
        if component == b"..":
            del kept[-1:]
        elif component not in (b"", b"."):
            kept.append(component)
    return b"/".join(kept)


def joined(directory: bytes, name: bytes) -> bytes:
    """The path of `name` in `directory`. The layer's root is b"" in relative paths and b"/" in absolute ones."""
    return directory + b"/" + name if directory not in (b"", b"/") else directory + name


def follow_links(path: bytes, read_link: Callable[[bytes], bytes | None], max_path_bytes: int) -> bytes:
    """Resolve all symbolic links in an absolute path, without leaving the root.

    Missing components are kept: they are directories that are still to be made.

    Args:
        path: the path.
        read_link: returns the target of the symbolic link at a resolved path, or None if there is no link.
        max_path_bytes: the limit of that name.

    Raises:
        TarError: the path leads through too many links.
        LayerLimitExceeded: a resolved path is too long.
    """
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
        if len(further) > max_path_bytes:
            raise LayerLimitExceeded("the length of a path", "max_path_bytes", max_path_bytes)
        target = read_link(further)
        if target is None:
            resolved = further
            continue
        links += 1
        if links > MAX_LINKS:
            raise TarError(f"{shown(path)} leads through more than {MAX_LINKS} links")
        if target.startswith(b"/"):
            resolved = b""
        names += target.split(b"/")[::-1]
    return resolved or b"/"
