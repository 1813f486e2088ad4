"""From layers to a mounted rootfs: overlay, and the mount system calls.

In: the layers of an image, bottom-most first, and two directories. Out: a writable overlay mount.

  overlay.py     the mount itself, and what the kernel's refusals mean
  attributes.py  what directories without an entry of their own must look like
  syscalls.py    fsopen and its family, by number

Nothing here knows images, bundles or the store's files. Start with `overlay.mount_rootfs`.
"""

from guestpull_server.snapshot.overlay import OverlayMounts, mount_rootfs

__all__ = ["OverlayMounts", "mount_rootfs"]
