"""Mounts layers as a rootfs with overlayfs, and unmounts it.

In: the layers of an image, bottom-most first, and two directories. Out: a writable overlay mount.

  overlay.py     mounts an overlay, and explains the kernel's errors
  attributes.py  sets the attributes of directories that layers have without an entry
  mounts.py      lists and unmounts overlays
  users.py       finds the users of a bundle's overlay on the machine
  mountinfo.py   parses /proc/PID/mountinfo of all mount namespaces
  permission.py  checks at start-up whether this process may mount
  syscalls.py    fsopen(2) and its family

Nothing here knows images, bundles or the store's files. Start with `overlay.mount_rootfs`.
"""

from guestpull_server.snapshot.mounts import OverlayMounts
from guestpull_server.snapshot.overlay import mount_rootfs
from guestpull_server.snapshot.permission import check_may_mount

__all__ = ["OverlayMounts", "check_may_mount", "mount_rootfs"]
