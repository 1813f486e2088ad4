"""The open store and all objects that use it. They are replaced when the work directory is.

Other programs may delete the work directory while we run: kata-agent removes all of /run/kata-containers when it
creates a sandbox. Each request begins with `Sessions.current`, which checks whether the work directory's path
still leads to the directory that was opened. If not, it abandons the old store and opens the work directory
again, as at startup.

Requests that still use the old store fail with WORK_DIR_REPLACED: an abandoned store refuses to write, because
its paths lead into the new one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, LayerNames
from guestpull_server.errors import GuestpullError, WorkDirReplaced
from guestpull_server.layer import LayerWorkers
from guestpull_server.pull.acquire import Acquirer
from guestpull_server.registry import RegistryClient
from guestpull_server.snapshot import OverlayMounts
from guestpull_server.store import Store

_log = logging.getLogger(__name__)


class Background(Protocol):
    """Work on one store in the background, from its construction to `close`."""

    def close(self) -> None:
        """Stop the work."""


@dataclass(frozen=True, slots=True)
class StoreSession:
    """One open store, and the objects that use it."""

    store: Store
    acquirer: Acquirer
    background: Sequence[Background]

    @classmethod
    def open(
        cls,
        configuration: Configuration,
        registry: RegistryClient,
        workers: LayerWorkers,
        *,
        guest_work_dir: str | None = None,
        layer_names: LayerNames | None = None,
        background: Sequence[Callable[[Store], Background]] = (),
    ) -> StoreSession:
        """Take over the work directory; see Puller.open for the arguments.

        Raises:
            GuestpullError: what `Store.open` raises.
        """
        store = Store.open(
            configuration.work_dir,
            OverlayMounts(),
            guest_work_dir=guest_work_dir,
            additional_stores=configuration.additional_stores,
            bundle_roots=configuration.bundle_roots,
            layer_names=layer_names,
        )
        acquirer = Acquirer(configuration, store, registry, workers)
        return cls(store, acquirer, [start(store) for start in background])

    def close(self, *, tidy: bool = False) -> None:
        """Release the work directory; see Store.close."""
        self._stop_background()
        self.store.close(tidy=tidy)

    def abandon(self) -> None:
        """Release the work directory without writing: its path leads to another directory now."""
        self._stop_background()
        self.store.abandon()

    def _stop_background(self) -> None:
        for work in self.background:
            work.close()


class Sessions:
    """The current session, from the first one to `close`. Thread-safe.

    Args:
        open_session: opens the work directory.
    """

    def __init__(self, open_session: Callable[[], StoreSession]) -> None:
        self._open_session = open_session
        self._lock = threading.Lock()
        self._closed = False
        self._session = open_session()

    def current(self) -> StoreSession:
        """Return the current session. If the work directory was replaced, open it again first.

        Raises:
            GuestpullError: what `StoreSession.open` raises. The next call tries again.
        """
        session = self._session
        if self._closed or session.store.is_in_place():
            return session
        with self._lock:
            if not (self._closed or self._session.store.is_in_place()):
                self._session.abandon()
                self._session = self._open_session()
                store = self._session.store
                _log.warning(
                    "the work directory was replaced; opened it again",
                    extra={"fields": {"work_dir": store.work_dir}},
                )
                for warning in store.warnings:
                    _log.warning("%s", warning)
            return self._session

    @contextmanager
    def using(self, cancellation: Cancellation) -> Iterator[StoreSession]:
        """Use the current session. If the work directory is replaced meanwhile, report a failure as such.

        Args:
            cancellation: of the work. After a cancellation, errors are raised unchanged.

        Raises:
            WorkDirReplaced: the work failed, and the work directory was replaced meanwhile.
            GuestpullError: what `StoreSession.open` raises.
        """
        session = self.current()
        try:
            yield session
        except (GuestpullError, OSError) as error:
            if cancellation.cancelled or session.store.is_in_place():
                raise
            raise WorkDirReplaced(session.store.work_dir) from error

    def close(self, *, tidy: bool = False) -> None:
        """Close the current session, and do not open another; see Store.close."""
        with self._lock:
            self._closed = True
            self._session.close(tidy=tidy)
