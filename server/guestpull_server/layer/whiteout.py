"""Translates OCI whiteouts into overlayfs's.

In a tar, a file `.wh.<name>` says that <name> is deleted, and `.wh..wh..opq` that everything that lower
layers have in the directory is deleted (OCI image specification, layer.md, "Whiteouts"). In overlayfs, a
character device 0:0 named <name> says the first, and the xattr `trusted.overlay.opaque` of the directory the
second (kernel documentation, filesystems/overlayfs.rst). A whiteout applies to lower layers only: what the
same layer has under that name stays, whichever comes first.

overlayfs looks for whiteouts only in directories that it merges. A directory that no other layer has, or that is
opaque, is listed as it is, and `ls` shows a name that cannot be found. An empty `trusted.overlay.origin` ("copied
up from an unknown place") makes overlayfs look for whiteouts there too.
"""

from __future__ import annotations

import os
import stat
from typing import Final

PREFIX: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"
AUFS_PREFIX: Final = b".wh..wh."
"""Prefix of aufs's internal files, which Docker, containerd and umoci skip too."""

OPAQUE_XATTR: Final = b"trusted.overlay.opaque"
OPAQUE: Final = b"y"
HAS_WHITEOUTS_XATTR: Final = b"trusted.overlay.origin"
HAS_WHITEOUTS: Final = b""
OVERLAY_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.")
"""Prefixes of xattrs that control overlayfs. Those of a tar are dropped: they could redirect to other layers."""


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this is a whiteout of overlayfs."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def make_whiteout(name: bytes) -> None:
    """Make a whiteout in the current directory; FileExistsError if the layer has the name."""
    os.mknod(name, stat.S_IFCHR, 0)
    os.utime(name, ns=(0, 0))
    have_whiteouts_seen()


def have_whiteouts_seen() -> None:
    """Make overlayfs look for whiteouts in the current directory."""
    os.setxattr(b".", HAS_WHITEOUTS_XATTR, HAS_WHITEOUTS)


def make_opaque(directory: bytes) -> None:
    """Hide what lower layers have in a directory."""
    os.setxattr(directory, OPAQUE_XATTR, OPAQUE, follow_symlinks=False)
