"""Deletes layers that have been unused for a while (`limits.unused_layer_seconds`).

A failed pull leaves the layers that it completed, so that the next attempt need not download them again. If no
attempt follows, this deletes them.
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
        store: holds the layers.
        seconds: how long a layer must be unused before it is deleted.
    """

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="expiry", daemon=True).start()

    def close(self) -> None:
        """Stop without waiting for a deletion in progress: the next start completes it."""
        self._closed.set()

    def _run(self) -> None:
        # a layer that becomes unused during the wait expires after the wait at the earliest
        while not self._closed.wait(self._store.seconds_until_unused_for(self._seconds)):
            try:
                deleted = self._store.delete_unused_for(self._seconds)
            except GuestpullError as error:
                _log.warning("unused layers cannot be deleted", extra={"fields": {"error": error.explain()}})
                self._closed.wait(self._seconds)
                continue
            if deleted.layers:
                fields = {"layers": ", ".join(deleted.layers), "bytes": deleted.freed_bytes}
                _log.info("unused layers were deleted", extra={"fields": fields})
