"""guestpull's storage core, its gRPC service and the daemon `guestpulld`.

The rooms, from top to bottom. A room imports only from rooms below it; import-linter checks this:

  cli.py      the commands of `guestpulld`
  service/    the gRPC server: calls, error statuses, start and stop
  upkeep/     bake, verify, gc, and the daemon's background work
  puller.py   the steps of a pull, in order. Start reading here
  pull/       the pipeline: from a request to an image whose layers are in the store
  registry/   resolves references and downloads blobs: authentication, the distribution client
  layer/      turns a blob into a directory: verify, decompress, read tar, extract, whiteouts
  store/      the work directory: meta_store.json, layers, bundles; locking and recovery
  snapshot/   mounts layers as a rootfs
  bundle/     converts the image config to the OCI runtime config
  config.py models.py platforms.py cancellation.py errors.py linux.py   used by all rooms

The core (everything except service/) is a synchronous library, which never loads gRPC:

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
    # load on first use: layer workers and `--help` do not need these
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
