"""Paths as tars have them."""

from __future__ import annotations


def clean(path: bytes) -> bytes:
    """A tar's path relative to the layer's root: no `.`, no `..`, no doubled or outer slashes.

    `..` at the root stays at the root, as everywhere in a chroot and as Go's filepath.Join("/", path) has it.
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
