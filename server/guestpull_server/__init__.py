"""guestpull's storage core, its gRPC service and the daemon `guestpulld`.

The rooms, and the way of the data (imports point one way, downwards; import-linter keeps it so):

  cli.py      the commands of `guestpulld`
  service/    gRPC in and out; error -> status; the server's life
  upkeep/     bake, verify, gc, and what a daemon does in the background
  puller.py   the conductor: the order of the steps of a pull, on one page. Start reading here
  pull/       the pipeline: from a request to an image whose layers are in the store
  registry/   where bytes come from: references, authentication, the distribution client
  layer/      bytes -> directory: verify, decompress, read tar, extract, whiteouts
  store/      what is on disk: meta_store.json, layers, bundles; locking and recovery
  snapshot/   layers -> mounted rootfs: overlay, and the mount system calls
  bundle/     image config -> OCI runtime config
  config.py models.py platforms.py cancellation.py errors.py   what every room may know

The core (everything but service/) is a plain synchronous library, which never loads gRPC:

    with Puller.open(Configuration(work_dir="/run/images")) as puller:
        pulled = puller.pull(PullRequest("busybox", "/run/bundles/one"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from guestpull_server.version import __version__

if TYPE_CHECKING:
    from guestpull_server.config import Configuration
    from guestpull_server.errors import GuestpullError
    from guestpull_server.pull import ImageRequest, PullRequest, Purpose
    from guestpull_server.puller import Puller

__all__ = [
    "Configuration",
    "GuestpullError",
    "ImageRequest",
    "PullRequest",
    "Puller",
    "Purpose",
    "__version__",
]

if not TYPE_CHECKING:
    # loaded on first use: layer workers and `--help` need none of it
    _ROOMS = {
        "Configuration": "config",
        "GuestpullError": "errors",
        "ImageRequest": "pull",
        "PullRequest": "pull",
        "Puller": "puller",
        "Purpose": "pull",
    }

    def __getattr__(name: str) -> object:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
