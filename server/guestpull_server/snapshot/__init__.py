"""From layers to a mounted rootfs, and back: overlay, who uses it, and the mount system calls.

In: the layers of an image, bottom-most first, and two directories. Out: a writable overlay mount.

  overlay.py     the mount itself, and what the kernel's refusals mean
  attributes.py  what directories without an entry of their own must look like
  mounts.py      what is mounted, and how it is unmounted
  users.py       who on the machine uses a bundle's overlay
  mountinfo.py   /proc/PID/mountinfo of all mount namespaces
  permission.py  whether this process may mount at all
  syscalls.py    fsopen and its family, by number

Nothing here knows images, bundles or the store's files. Start with `overlay.mount_rootfs`.
"""

from guestpull_server.snapshot.mounts import OverlayMounts
from guestpull_server.snapshot.overlay import mount_rootfs
from guestpull_server.snapshot.permission import check_may_mount

__all__ = ["OverlayMounts", "check_may_mount", "mount_rootfs"]
