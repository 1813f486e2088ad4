"""Converts an image config to an OCI runtime config.

In: the bytes of the image config, and the mounted rootfs, in which users are looked up. Out: `config.json` in the
bundle, which a runtime can start unchanged.

  runtime.py      converts the image config, and supplies defaults
  users.py        resolves the image's User to uid and gids
  volumes.py      converts the image's Volumes to mounts
  annotations.py  converts the image's Labels and other fields to annotations
  spec.py         the document of the runtime specification
  image_files.py  reads the image's files without leaving its rootfs

Nothing here mounts anything or uses the store. Start with `runtime.write_runtime_config`.
"""

from guestpull_server.bundle.runtime import write_runtime_config

__all__ = ["write_runtime_config"]
