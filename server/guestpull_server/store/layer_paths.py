"""Where layers are: the path that meta_store.json has, which is the guest's, and the path on this machine.

The two differ in three cases. A baked store is made at one path and mounted at another in the guest
(`--guest-work-dir`). A store that was copied or mounted elsewhere still contains its old paths. And an entry may
point into another store, which is only read.

Nobody who can write meta_store.json may get a directory of the host mounted: the path in an entry must have the
form of a layer's directory, and must not be any other directory of the work directory.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.filesystem import is_directory
from guestpull_server.store.layer_metadata import LayerMetadata, named_directory

_DIGEST_NAME: Final = re.compile(r"sha\d+_[0-9a-f]+")
_RUNNING_NUMBER: Final = re.compile(r"[0-9]+")


class LayerPaths:
    """The paths of the layers in one meta_store.json.

    Args:
        work_dir: the store's work directory on this machine.
        guest_work_dir: the same directory in the guest; None if the path is the same.

    Attributes:
        is_for_a_guest: `guest_work_dir` was given.
    """

    def __init__(self, work_dir: str, guest_work_dir: str | None = None) -> None:
        self.is_for_a_guest = guest_work_dir is not None
        self._work_dir = work_dir
        self._layers = os.path.join(work_dir, "layers")
        self._inside_here = f"{work_dir.rstrip('/')}/"
        self._inside_guest = f"{os.path.normpath(guest_work_dir or work_dir).rstrip('/')}/"
        self._layers_of_guest = f"{self._inside_guest}layers"
        self._moved: dict[tuple[Digest, str], str] = {}
        self._ours: dict[str, bool] = {self._layers: True}
        self._places: dict[str, str] = {self._layers: ""}

    def written(self, directory_name: str) -> str:
        """Return the store_path to write for a directory in our layers/."""
        return f"{self._layers_of_guest}/{directory_name}"

    def local(self, layer: StoredLayer) -> str:
        """Return a layer's path on this machine."""
        store_path = layer.store_path
        if self._moved:
            found = self._moved.get((layer.compressed_digest, store_path))
            if found is not None:
                return found
        parent, _, name = store_path.rpartition("/")
        if parent == self._layers_of_guest and name not in ("", ".", ".."):  # as nearly all are
            return f"{self._layers}/{name}"
        if parent == self._layers:  # it is local already; the guest's work directory may be a parent of ours
            return store_path
        path = os.path.normpath(store_path)
        if path.startswith(self._inside_guest):
            return self._inside_here + path[len(self._inside_guest) :]
        return path

    def is_ours(self, layer: StoredLayer) -> bool:
        """Return whether a layer lies in our layers/; all others are only read."""
        return self._is_our_layers(self.local(layer).rpartition("/")[0])

    def _is_our_layers(self, parent: str) -> bool:
        known = self._ours.get(parent)
        if known is None:
            # the work directory may have two names, one of them through a link
            known = self._ours[parent] = os.path.realpath(parent) == os.path.realpath(self._layers)
        return known

    def claims(self, layers: Iterable[StoredLayer]) -> dict[str, set[str]]:
        """Return, for each directory in our layers/, the layers whose entries name it."""
        claims: dict[str, set[str]] = {}
        for layer in layers:
            parent, _, name = self.local(layer).rpartition("/")
            if self._is_our_layers(parent):
                claims.setdefault(name, set()).add(layer.compressed_digest)
        return claims

    def misplaced(self, layer: StoredLayer) -> str:
        """Return why an entry's store_path cannot be that layer's directory, or ""."""
        parent, _, name = layer.store_path.rpartition("/")
        if parent == self._layers_of_guest and name == layer.compressed_digest.directory_name:
            return ""
        if "/../" in f"{layer.store_path}/":
            return f"store_path {layer.store_path[:100]!r} contains `..`"
        name = named_directory(layer)
        if _RUNNING_NUMBER.fullmatch(name) is None:
            if _DIGEST_NAME.fullmatch(name) is None:
                return f"store_path {layer.store_path[:100]!r} is not a layer's directory"
            if name != layer.compressed_digest.directory_name:
                return f"store_path {layer.store_path[:100]!r} is another layer's directory"
        parent = os.path.dirname(self.local(layer))
        if parent not in self._places:
            self._places[parent] = self._misplaced_parent(parent)
        return self._places[parent] and f"store_path {layer.store_path[:100]!r} {self._places[parent]}"

    def _misplaced_parent(self, parent: str) -> str:
        if os.path.basename(parent) != "layers":
            return "is not in a directory named layers"
        # either may have two names, one of them through a link
        real, work_dir = os.path.realpath(parent), os.path.realpath(self._work_dir)
        if real == os.path.realpath(self._layers):
            return ""
        if f"{real}/".startswith(f"{work_dir}/"):
            return "is in the work directory, but not in its layers/"
        if f"{work_dir}/".startswith(f"{real}/"):
            return "is a parent of the work directory"
        return ""

    def localised(self, layer: StoredLayer) -> StoredLayer:
        """Return a layer with its path on this machine."""
        path = self.local(layer)
        return layer if path == layer.store_path else dataclasses.replace(layer, store_path=path)

    def find_moved(
        self,
        layers: Iterable[StoredLayer],
        metadata: Mapping[str, LayerMetadata],
        *,
        is_made_elsewhere: bool,
    ) -> None:
        """Find layers in our layers/ that are not where their entries point. The entries do not change.

        A layer for which the store has metadata is in the store's layers/, even if something exists at the path
        that it was made for: that may be another store made for the same path. A directory without metadata is
        taken for a layer only if its name is unambiguous: running numbers (image-rs's naming) mean different
        layers in two stores.

        Args:
            layers: the layers that have entries.
            metadata: of this store.
            is_made_elsewhere: nobody unpacks layers here. Then what is in layers/ is complete, and takes
                precedence over the paths in the entries, unless some entries point here and some elsewhere.
        """
        layers = list(layers)
        claims = Counter(named_directory(layer) for layer in layers)
        confirmed = [layer for layer in layers if self._is_confirmed(layer, metadata, claims)]
        for layer in confirmed:
            self._put(layer, metadata[layer.compressed_digest].directory)
        elsewhere = [layer for layer in layers if not self.is_ours(layer)]
        if not elsewhere:
            return
        is_complete = is_made_elsewhere and len(elsewhere) + len(confirmed) == len(layers)
        described = {one.directory for one in metadata.values()}
        for layer in elsewhere:
            name = named_directory(layer)
            known = metadata.get(layer.compressed_digest)
            is_certain = name == layer.compressed_digest.directory_name or (
                known.directory == name if known is not None else claims[name] == 1 and name not in described
            )
            here = os.path.join(self._layers, name)
            if is_certain and is_directory(here) and (is_complete or not is_directory(layer.store_path)):
                self._put(layer, name)

    def _is_confirmed(
        self, layer: StoredLayer, metadata: Mapping[str, LayerMetadata], claims: Mapping[str, int]
    ) -> bool:
        """Return whether the store's own metadata says where a layer is."""
        known = metadata.get(layer.compressed_digest)
        if known is None or known.uncompressed_digest != layer.uncompressed_digest:
            return False
        name = known.directory
        if name != named_directory(layer) and name in claims:
            return False  # another program reused the number for another layer
        here = os.path.join(self._layers, name)
        return "/" not in name and (self.local(layer) == here or is_directory(here))

    def _put(self, layer: StoredLayer, directory_name: str) -> None:
        here = f"{self._layers}/{directory_name}"
        if self.local(layer) != here:
            self._moved[layer.compressed_digest, layer.store_path] = here
