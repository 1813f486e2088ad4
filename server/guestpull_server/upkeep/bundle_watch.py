"""Releases bundles that other programs have removed without calling ReleaseBundle.

When a container ends, kata-agent unmounts its rootfs with MNT_DETACH and removes the bundle's directory. It does
not call ReleaseBundle: without this module, the upper directory and the layers would stay forever. The store
decides which bundles are abandoned (`Store.abandoned_bundles`); this module decides when to check.

poll(2) on /proc/self/mountinfo reports when a mount of this namespace changes. Nothing reports the removal of a
directory, or the end of the last mount in another namespace. So after a change this checks repeatedly, at
increasing intervals.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Final

from guestpull_server.errors import GuestpullError
from guestpull_server.store import Store, StoredBundle

_log = logging.getLogger(__name__)

_SETTLING_MS: Final = 1000  # from a change to the check: on a busy machine, mounts change all the time
_FIRST_PAUSE_MS: Final = 1000  # after a check; doubled each time without a change
_LONGEST_PAUSE_MS: Final = 10_000  # the longest time until the removal of a directory is noticed
_STOP_SECONDS: Final = 5.0  # to delete an upper directory; the next start deletes the rest


class BundleWatch:
    """A thread that releases abandoned bundles until `close`.

    Args:
        store: the store of the bundles.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._warned: set[str] = set()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(
            target=self._run, args=(self._stop,), name="bundle-watch", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Wait a few seconds for a deletion in progress. Idempotent."""
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join(_STOP_SECONDS)
        if not self._thread.is_alive():
            os.close(self._stop)
        self._stop = -1

    def _run(self, stop: int) -> None:
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            stopping, changed_or_stopping = select.poll(), select.poll()
            for poll in (stopping, changed_or_stopping):
                poll.register(stop, select.POLLIN)
            changed_or_stopping.register(mountinfo, select.POLLPRI | select.POLLERR)
            pause = _FIRST_PAUSE_MS
            while True:
                self._check()
                if not changed_or_stopping.poll(pause):
                    pause = min(2 * pause, _LONGEST_PAUSE_MS)
                elif stopping.poll(_SETTLING_MS):
                    return
                else:
                    pause = _FIRST_PAUSE_MS

    def _check(self) -> None:
        if not self._store.is_in_place():
            return
        for bundle in self._store.abandoned_bundles():
            try:
                self._release(bundle)
            except GuestpullError as error:
                self._warn(bundle, error)

    def _release(self, bundle: StoredBundle) -> None:
        deleted = self._store.release_abandoned_bundle(bundle)
        if deleted is None:
            return
        fields = {
            "bundle": bundle.bundle_path,
            "image": bundle.image_id,
            "deleted_layers": len(deleted.layers),
            "freed_bytes": deleted.freed_bytes,
        }
        # nobody called ReleaseBundle: the log must explain where the container's files went
        _log.warning("a bundle whose rootfs is gone was released", extra={"fields": fields})

    def _warn(self, bundle: StoredBundle, error: GuestpullError) -> None:
        if str(error) not in self._warned:
            self._warned.add(str(error))
            fields = {"bundle": bundle.bundle_path, "problem": str(error)}
            _log.warning("a bundle whose rootfs is gone cannot be released", extra={"fields": fields})
