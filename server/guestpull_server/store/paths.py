"""Where layers are: as meta_store.json writes it, which is as the guest will see it, and on this machine.

Three things set the two apart. A store that is baked is mounted somewhere while it is made, and elsewhere in the
guest (`--guest-work-dir`). A store that is copied or mounted to another place still has the old paths in it. And
an entry may lead to another store, which is then only read.

Whoever can write meta_store.json must not have the host's own directories mounted by it: what an entry names is a
layer's directory by its form, and none of the other directories of the work directory.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.facts import LayerFacts, named_directory

_DIGEST_NAME: Final = re.compile(r"sha\d+_[0-9a-f]+")
_RUNNING_NUMBER: Final = re.compile(r"[0-9]+")


class LayerPaths:
    """The paths of the layers that one meta_store.json names.

    Args:
        work_dir: the store's work directory, as it is here.
        guest_work_dir: the same, as its guest sees it; None: as here.

    Attributes:
        is_for_a_guest: we were told where its guest sees it.
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
        """The store_path that is written for a directory in our layers/."""
        return f"{self._layers_of_guest}/{directory_name}"

    def local(self, layer: StoredLayer) -> str:
        """Where a layer is on this machine."""
        store_path = layer.store_path
        if self._moved:
            found = self._moved.get((layer.compressed_digest, store_path))
            if found is not None:
                return found
        parent, _, name = store_path.rpartition("/")
        if parent == self._layers_of_guest and name not in ("", ".", ".."):  # as nearly all are
            return f"{self._layers}/{name}"
        if parent == self._layers:  # it is said already; the guest's path may be where ours begins
            return store_path
        path = os.path.normpath(store_path)
        if path.startswith(self._inside_guest):
            return self._inside_here + path[len(self._inside_guest) :]
        return path

    def is_ours(self, layer: StoredLayer) -> bool:
        """Whether a layer lies in our layers/; all others are only read."""
        return self._is_our_room(self.local(layer).rpartition("/")[0])

    def _is_our_room(self, parent: str) -> bool:
        known = self._ours.get(parent)
        if known is None:
            # the work directory may be known by two names, one of them through a link
            known = self._ours[parent] = os.path.realpath(parent) == os.path.realpath(self._layers)
        return known

    def claims(self, layers: Iterable[StoredLayer]) -> dict[str, set[str]]:
        """The layers that lie in our layers/ by their entries, by their directories' names there."""
        claims: dict[str, set[str]] = {}
        for layer in layers:
            parent, _, name = self.local(layer).rpartition("/")
            if self._is_our_room(parent):
                claims.setdefault(name, set()).add(layer.compressed_digest)
        return claims

    def misplaced(self, layer: StoredLayer) -> str:
        """Why a layer's entry cannot be believed to name its directory; empty if it can."""
        parent, _, name = layer.store_path.rpartition("/")
        if parent == self._layers_of_guest and name == layer.compressed_digest.directory_name:
            return ""
        if "/../" in f"{layer.store_path}/":
            return f"store_path {layer.store_path[:100]!r} leads back up"
        name = named_directory(layer)
        if _RUNNING_NUMBER.fullmatch(name) is None:
            if _DIGEST_NAME.fullmatch(name) is None:
                return f"store_path {layer.store_path[:100]!r} is no layer's directory"
            if name != layer.compressed_digest.directory_name:
                return f"store_path {layer.store_path[:100]!r} is another layer's directory"
        parent = os.path.dirname(self.local(layer))
        if parent not in self._places:
            self._places[parent] = self._misplaced_parent(parent)
        return self._places[parent] and f"store_path {layer.store_path[:100]!r} {self._places[parent]}"

    def _misplaced_parent(self, parent: str) -> str:
        if os.path.basename(parent) != "layers":
            return "is in no directory of layers"
        # either may be known by two names, one of them through a link
        real, work_dir = os.path.realpath(parent), os.path.realpath(self._work_dir)
        if real == os.path.realpath(self._layers):
            return ""
        if f"{real}/".startswith(f"{work_dir}/"):
            return "is inside of the work directory, but not in its layers/"
        if f"{work_dir}/".startswith(f"{real}/"):
            return "is around the work directory"
        return ""

    def localised(self, layer: StoredLayer) -> StoredLayer:
        """A layer with its path as it is here."""
        path = self.local(layer)
        return layer if path == layer.store_path else dataclasses.replace(layer, store_path=path)

    def find_moved(
        self, layers: Iterable[StoredLayer], facts: Mapping[str, LayerFacts], *, is_made_elsewhere: bool
    ) -> None:
        """Look in our layers/ for layers that are not where their entries say; the entries stay as they are.

        What the store's own facts vouch for is in its layers/, whatever lies at the place that it was made for:
        another store may have been made for the same. Without facts, a directory is taken for a layer only where
        its name cannot mean another: running numbers of two stores (as image-rs gives them) are the same numbers.

        Args:
            layers: the layers that have entries.
            facts: of this store.
            is_made_elsewhere: nobody unpacks layers here, so that what is here is whole, and goes before what
                lies where the entries say; unless some entries say that it is here, and mean others as well.
        """
        layers = list(layers)
        claims = Counter(named_directory(layer) for layer in layers)
        vouched = [layer for layer in layers if self._is_vouched_for(layer, facts, claims)]
        for layer in vouched:
            self._put(layer, facts[layer.compressed_digest].directory)
        elsewhere = [layer for layer in layers if not self.is_ours(layer)]
        if not elsewhere:
            return
        is_whole = is_made_elsewhere and len(elsewhere) + len(vouched) == len(layers)
        known_as_others = {one.directory for one in facts.values()}
        for layer in elsewhere:
            name = named_directory(layer)
            known = facts.get(layer.compressed_digest)
            is_certain = name == layer.compressed_digest.directory_name or (
                known.directory == name
                if known is not None
                else claims[name] == 1 and name not in known_as_others
            )
            here = os.path.join(self._layers, name)
            if is_certain and is_directory(here) and (is_whole or not is_directory(layer.store_path)):
                self._put(layer, name)

    def _is_vouched_for(
        self, layer: StoredLayer, facts: Mapping[str, LayerFacts], claims: Mapping[str, int]
    ) -> bool:
        known = facts.get(layer.compressed_digest)
        if known is None or known.uncompressed_digest != layer.uncompressed_digest:
            return False
        name = known.directory
        # another program gave its number to another layer
        if name != named_directory(layer) and name in claims:
            return False
        here = os.path.join(self._layers, name)
        return "/" not in name and (self.local(layer) == here or is_directory(here))

    def _put(self, layer: StoredLayer, directory_name: str) -> None:
        here = f"{self._layers}/{directory_name}"
        if self.local(layer) != here:
            self._moved[layer.compressed_digest, layer.store_path] = here


def is_directory(path: str) -> bool:
    """Whether a layer can lie at a path: a directory, and no link to one, which may lead anywhere."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
