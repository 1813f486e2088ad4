"""Deletes layers that nobody has used for a while (`limits.unused_layer_seconds`).

A pull that fails leaves the layers that it completed, so that the next attempt need not download them again. If no
attempt follows, they are deleted here.
"""

from __future__ import annotations

import logging
import threading

from guestpull_server.errors import GuestpullError
from guestpull_server.store import Store

_log = logging.getLogger(__name__)


class Expiry:
    """A thread that deletes the unused layers of one store, until `close`.

    Args:
        store: whose layers are deleted.
        seconds: how long a layer must have been unused.
    """

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="expiry", daemon=True).start()

    def close(self) -> None:
        """End, without waiting for a deletion that is under way: the next start completes it."""
        self._closed.set()

    def _run(self) -> None:
        # a layer that is let go while this waits cannot have been unused for longer than this waits
        while not self._closed.wait(self._store.seconds_until_unused_for(self._seconds)):
            try:
                deleted = self._store.delete_unused_for(self._seconds)
            except GuestpullError as error:
                _log.warning("unused layers cannot be deleted", extra={"fields": {"error": error.explain()}})
                self._closed.wait(self._seconds)
                continue
            if deleted.layers:
                told = {"layers": ", ".join(deleted.layers), "bytes": deleted.freed_bytes}
                _log.info("unused layers were deleted", extra={"fields": told})
