"""From an image config to an OCI runtime config.

In: the image config's bytes, and the mounted rootfs that users are looked up in. Out: `config.json` in the
bundle, which a runtime starts as it is.

  runtime.py  the conversion, and the defaults where an image says nothing
  users.py    the image's User -> numbers
  volumes.py  the image's Volumes -> mounts
  annotations.py  the image's Labels, and what else becomes annotations
  spec.py     the runtime specification's document
  image_files.py  looking at what is in the image, without being led out of it

Nothing here mounts, and nothing here knows the store. Start with `runtime.write_runtime_config`.
"""

from guestpull_server.bundle.runtime import write_runtime_config

__all__ = ["write_runtime_config"]
