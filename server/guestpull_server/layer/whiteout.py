"""OCI whiteouts -> overlayfs's.

A tar says "this is gone" by a file `.wh.<name>`, and "all that lower layers have here is gone" by a file
`.wh..wh..opq` (OCI image specification, layer.md, "Whiteouts"). overlayfs says so by a character device 0:0
named `<name>`, and by the xattr `trusted.overlay.opaque` of the directory (Documentation/filesystems/
overlayfs.rst). A whiteout speaks of lower layers only: what the same layer has under that name stays,
whichever comes first.

overlayfs looks for whiteouts only in directories that it merges. One that no other layer has, or that is opaque,
it lists as it is, and `ls` shows a name that cannot be found. An empty `trusted.overlay.origin` ("copied up, from
where is not known") makes it look there too.
"""

from __future__ import annotations

import os
import stat
from typing import Final

PREFIX: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"
AUFS_PREFIX: Final = b".wh..wh."
"""Names that aufs kept its own state under; they mean nothing to a container, and every peer skips them."""

OPAQUE_XATTR: Final = b"trusted.overlay.opaque"
OPAQUE: Final = b"y"
HAS_WHITEOUTS_XATTR: Final = b"trusted.overlay.origin"
HAS_WHITEOUTS: Final = b""
OVERLAY_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.")
"""xattrs by which a directory steers overlayfs. A tar must not: it could redirect into other layers."""


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this is overlayfs's whiteout."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def make_whiteout(name: bytes) -> None:
    """Mark a name in the current directory as gone; FileExistsError if the layer has it."""
    os.mknod(name, stat.S_IFCHR, 0)
    os.utime(name, ns=(0, 0))
    have_whiteouts_seen()


def have_whiteouts_seen() -> None:
    """Have overlayfs look for whiteouts in the current directory."""
    os.setxattr(b".", HAS_WHITEOUTS_XATTR, HAS_WHITEOUTS)


def make_opaque(directory: bytes) -> None:
    """Hide what lower layers have in this directory."""
    os.setxattr(directory, OPAQUE_XATTR, OPAQUE, follow_symlinks=False)
