"""Where layers are: as meta_store.json writes it, which is as the guest will see it, and on this machine.

Three things set the two apart. A store that is baked is mounted somewhere while it is made, and elsewhere in the
guest (`--guest-work-dir`). A store that is copied or mounted to another place still has the old paths in it. And
an entry may lead to another store, which is then only read.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from guestpull_server.models import StoredLayer
from guestpull_server.store.facts import LayerFacts


class LayerPaths:
    """The paths of the layers that one meta_store.json names.

    Args:
        work_dir: the store's work directory, as it is here.
        guest_work_dir: the same, as its guest sees it; None: as here.
    """

    def __init__(self, work_dir: str, guest_work_dir: str | None = None) -> None:
        self._layers = os.path.join(work_dir, "layers")
        self._inside_here = f"{work_dir.rstrip('/')}/"
        self._inside_guest = f"{os.path.normpath(guest_work_dir or work_dir).rstrip('/')}/"
        self._layers_of_guest = f"{self._inside_guest}layers"
        self._moved: dict[str, str] = {}
        self._ours: dict[str, bool] = {self._layers: True}

    def written(self, directory_name: str) -> str:
        """The store_path that is written for a directory in our layers/."""
        return f"{self._layers_of_guest}/{directory_name}"

    def local(self, store_path: str) -> str:
        """Where a store_path is on this machine."""
        parent, _, name = store_path.rpartition("/")
        if parent == self._layers_of_guest and name not in ("", ".", ".."):  # as nearly all are
            return f"{self._layers}/{name}"
        found = self._moved.get(store_path)
        if found is not None:
            return found
        path = os.path.normpath(store_path)
        if path.startswith(self._inside_guest):
            return self._inside_here + path[len(self._inside_guest) :]
        return path

    def is_ours(self, store_path: str) -> bool:
        """Whether a layer lies in our layers/; all others are only read."""
        parent = self.local(store_path).rpartition("/")[0]
        known = self._ours.get(parent)
        if known is None:
            # the work directory may be known by two names, one of them through a link
            known = self._ours[parent] = os.path.realpath(parent) == os.path.realpath(self._layers)
        return known

    def localised(self, layer: StoredLayer) -> StoredLayer:
        """A layer with its path as it is here."""
        path = self.local(layer.store_path)
        return layer if path == layer.store_path else dataclasses.replace(layer, store_path=path)

    def find_moved(self, layers: Iterable[StoredLayer], facts: Mapping[str, LayerFacts]) -> None:
        """Look in our layers/ for layers that are not where their entries say; the entries stay as they are.

        A directory is taken for a layer only where its name cannot mean another: running numbers of two stores
        (as image-rs gives them) are the same numbers.
        """
        elsewhere = [layer for layer in layers if not self.is_ours(layer.store_path)]
        if not elsewhere:
            return
        claims = Counter(os.path.basename(os.path.normpath(layer.store_path)) for layer in layers)
        for layer in elsewhere:
            name = os.path.basename(os.path.normpath(layer.store_path))
            known = facts.get(layer.compressed_digest)
            certain = name == layer.compressed_digest.directory_name or (
                known.directory == name if known is not None else claims[name] == 1
            )
            here = os.path.join(self._layers, name)
            if certain and not os.path.isdir(layer.store_path) and os.path.isdir(here):
                self._moved[layer.store_path] = here
