"""From a stream of bytes to a directory that overlayfs can use."""
