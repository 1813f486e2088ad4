"""From layers to a mounted rootfs: overlay, and the mount system calls."""
