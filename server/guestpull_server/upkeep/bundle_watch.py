"""Releases bundles that others have taken away without a call.

At a container's end kata-agent unmounts its rootfs with MNT_DETACH and removes its bundle's directory. It does not
call ReleaseBundle: without this, the upper directory and the layers would stay for ever. The store decides which
bundles are abandoned (`Store.abandoned_bundles`); this decides when to look.

poll(2) on /proc/self/mountinfo tells when a mount of this namespace changes. Nothing tells when a directory is
removed, or when the last mount in another namespace ends, so there are more looks after a change, at growing
intervals.
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

_SETTLING_MS: Final = 1000  # from a change to the look: on a busy machine mounts change all the time
_FIRST_PAUSE_MS: Final = 1000  # after a look; doubled each time that nothing has changed
_LONGEST_PAUSE_MS: Final = 10_000  # the longest that a directory's removal goes unseen
_SECONDS_TO_END: Final = (
    5.0  # for the deletion of an upper directory; what is left is deleted at the next start
)


class BundleWatch:
    """A thread that releases the abandoned bundles of one store, from here to `close`.

    Args:
        store: whose bundles.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._warned: set[str] = set()
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(
            target=self._run, args=(self._ended,), name="bundle-watch", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End, after the deletion that is under way unless that takes long. Harmless to repeat."""
        if self._ended < 0:
            return
        os.eventfd_write(self._ended, 1)
        self._thread.join(_SECONDS_TO_END)
        if not self._thread.is_alive():
            os.close(self._ended)
        self._ended = -1

    def _run(self, ended: int) -> None:
        with open("/proc/self/mountinfo", "rb") as mountinfo:
            end, change_or_end = select.poll(), select.poll()
            for poll in (end, change_or_end):
                poll.register(ended, select.POLLIN)
            change_or_end.register(mountinfo, select.POLLPRI | select.POLLERR)
            pause = _FIRST_PAUSE_MS
            while True:
                self._look()
                if not change_or_end.poll(pause):
                    pause = min(2 * pause, _LONGEST_PAUSE_MS)
                elif end.poll(_SETTLING_MS):
                    return
                else:
                    pause = _FIRST_PAUSE_MS

    def _look(self) -> None:
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
        told = {
            "bundle": bundle.bundle_path,
            "image": bundle.image_id,
            "deleted_layers": len(deleted.layers),
            "freed_bytes": deleted.freed_bytes,
        }
        # without a call: whoever misses what was written in it must find out by the log
        _log.warning("a bundle whose rootfs is gone was released", extra={"fields": told})

    def _warn(self, bundle: StoredBundle, error: GuestpullError) -> None:
        if str(error) not in self._warned:
            self._warned.add(str(error))
            told = {"bundle": bundle.bundle_path, "problem": str(error)}
            _log.warning("a bundle whose rootfs is gone cannot be released", extra={"fields": told})
