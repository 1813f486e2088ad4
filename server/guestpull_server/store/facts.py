"""layer_facts.jsonl: what we know of the layers that we unpacked, and meta_store.json has no place for.

One line a layer, added before the layer gets its name in layers/, and one that strikes it out when it is
deleted. The last line of a layer counts; a line that a crash cut short counts as none. With a layer's directory
and its line, its entry in `layer_db` can be made again: that is how the next start takes in what was committed
just before a crash, and what is left when meta_store.json is damaged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Final, Self

import msgspec

from guestpull_server.models import Decoder, Digest, StoredLayer, UnpackedLayer
from guestpull_server.store.durability import Durability
from guestpull_server.store.files import NoFile, read_file

FILE_NAME: Final = "layer_facts.jsonl"
_MAX_LINE_BYTES: Final = 64 * 1024 * 1024


class LayerFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """The facts of one layer. `directory` is its name in layers/; implied directories are Latin-1 text.

    A path is bytes; Latin-1 gives each byte a character, so that any path is a JSON text.

    `committed_at` is the time of the commit, in seconds since 1970. It is 0 in a store that was baked, and there
    layers without an image are meant to stay: only what has a time is deleted when it has been unused for long.
    """

    compressed_digest: str
    uncompressed_digest: str
    decoder: Decoder
    directory: str
    size_bytes: int
    entries: int
    implied_directories: list[str] = []
    committed_at: int = 0

    @classmethod
    def of(cls, compressed_digest: Digest, directory: str, unpacked: UnpackedLayer) -> Self:
        """The facts of a layer that was just unpacked."""
        return cls(
            compressed_digest=compressed_digest,
            uncompressed_digest=unpacked.diff_id,
            decoder=unpacked.decoder,
            directory=directory,
            size_bytes=unpacked.size_bytes,
            entries=unpacked.entries,
            implied_directories=[path.decode("latin-1") for path in unpacked.implied_directories],
            committed_at=int(time.time()),
        )

    def layer(self, store_path: str) -> StoredLayer:
        """The layer that these are the facts of.

        Raises:
            InvalidDigest: a digest is none.
        """
        return StoredLayer(
            Digest(self.compressed_digest),
            Digest(self.uncompressed_digest),
            self.decoder,
            store_path,
            size_bytes=self.size_bytes,
            implied_directories=self.implied_paths,
        )

    @property
    def implied_paths(self) -> tuple[bytes, ...]:
        """The implied directories as paths; those that no path can be are left out."""
        paths: list[bytes] = []
        for text in self.implied_directories:
            try:
                paths.append(text.encode("latin-1"))
            except UnicodeEncodeError:
                continue
        return tuple(paths)


class _Struck(msgspec.Struct, frozen=True):
    """The line that strikes a layer out."""

    gone: str


class FactsFile:
    """The file of one work directory. Not thread-safe."""

    def __init__(self, work_dir: str, durability: Durability) -> None:
        self._path = os.path.join(work_dir, FILE_NAME)
        self._durability = durability

    def add(self, facts: LayerFacts) -> None:
        """Add a layer's facts, durably."""
        self._durability.append(self._path, msgspec.json.encode(facts, enc_hook=str) + b"\n")

    def strike_out(self, digests: Iterable[str]) -> None:
        """Declare layers gone, durably."""
        lines = [msgspec.json.encode(_Struck(digest), enc_hook=str) + b"\n" for digest in digests]
        if lines:
            self._durability.append(self._path, b"".join(lines))

    def rewrite(self, facts: Mapping[str, LayerFacts]) -> None:
        """Keep these facts and no others, in a fixed order."""
        if not facts and not os.path.lexists(self._path):
            return
        lines = [msgspec.json.encode(facts[digest], enc_hook=str) + b"\n" for digest in sorted(facts)]
        content = b"".join(lines)
        if content != read_file(self._path):  # what is so already needs no room on a full disk
            self._durability.replace(self._path, content)


def read_facts(work_dir: str) -> tuple[dict[str, LayerFacts], int]:
    """The facts that a work directory has, and how many lines of its file are of no use any more.

    They are by compressed digest, as it is written: of what there may be, most is asked for by digests only.

    Raises:
        NoFile: something else has the file's name.
    """
    try:
        lines = (read_file(os.path.join(work_dir, FILE_NAME)) or b"").split(b"\n")
    except OSError:
        return {}, 0
    facts: dict[str, LayerFacts] = {}
    decoder = msgspec.json.Decoder(LayerFacts)
    count = 0
    for line in lines:
        if not line:
            continue
        count += 1
        try:
            if line.startswith(b'{"gone":'):
                facts.pop(msgspec.json.decode(line, type=_Struck).gone, None)
            elif len(line) <= _MAX_LINE_BYTES:
                one = decoder.decode(line)
                facts[one.compressed_digest] = one
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return facts, count - len(facts)


def facts_beside(work_dir: str) -> dict[str, LayerFacts]:
    """The facts of a work directory that is only read: none, where there is no such file."""
    try:
        return read_facts(work_dir)[0]
    except NoFile:
        return {}


def standing_facts(
    facts: Mapping[str, LayerFacts], present: Iterable[str], claims: Mapping[str, Collection[str]]
) -> dict[str, LayerFacts]:
    """The facts that are of directories that are there, and are still the layer's own.

    Another program may have given a running number anew, which our facts know as another layer's.

    Args:
        facts: by compressed digest.
        present: the names in layers/.
        claims: the layers that entries say to be in them.
    """
    there = frozenset(present)
    return {
        digest: one
        for digest, one in facts.items()
        if one.directory in there and digest in claims.get(one.directory, (digest,))
    }


def with_facts(layer: StoredLayer, facts: LayerFacts | None) -> StoredLayer:
    """A layer with what its facts say, if they are of the same tar."""
    if facts is None or facts.uncompressed_digest != layer.uncompressed_digest:
        return layer
    return StoredLayer(
        layer.compressed_digest,
        layer.uncompressed_digest,
        layer.decoder,
        layer.store_path,
        layer.encrypted,
        facts.size_bytes,
        facts.implied_paths,
    )


def named_directory(entry: StoredLayer) -> str:
    """The name of the directory that an entry means, in whatever layers/ it is."""
    name = entry.store_path.rpartition("/")[2]
    return name if name not in ("", ".", "..") else os.path.basename(os.path.normpath(entry.store_path))


def contradiction(entry: StoredLayer, facts: LayerFacts) -> str:
    """How a layer's entry differs from what is known of it, though its directory is there; empty if it does not.

    An entry may name our directory at another place: a work directory is made here, and moved or mounted there.
    """
    if facts.uncompressed_digest != entry.uncompressed_digest:
        return f"it was unpacked from {facts.uncompressed_digest}, but its entry says {entry.uncompressed_digest}"
    if named_directory(entry) != facts.directory:
        return f"it is in layers/{facts.directory}, but its entry says {entry.store_path[:100]!r}"
    return ""
