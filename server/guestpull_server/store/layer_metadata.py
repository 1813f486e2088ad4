"""records/<name>.json: the metadata of one layer that we unpacked, for which meta_store.json has no fields.

The file is durable before the layer's directory gets its name in layers/, and is deleted after the directory. With
both, the layer's entry in `layer_db` can be restored: that is how the next start adds a layer that was committed
just before a crash, and what remains when meta_store.json is damaged. A file that cannot be used counts as
missing.

Earlier versions kept layer_facts.jsonl instead, a log for all layers: one line for each layer, the last one
counts, and `{"gone": digest}` when a layer is deleted. It is read where it is found, and replaced at the next
start that may write (durability.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

import msgspec

from guestpull_server.models import Decoder, Digest, StoredLayer, UnpackedLayer
from guestpull_server.store.durability import Durability
from guestpull_server.store.filesystem import NotAFile, read_file

OLD_FILE_NAME: Final = "layer_facts.jsonl"
RECORDS: Final = "records"
SUFFIX: Final = ".json"
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW
_SMALL_FILE_BYTES: Final = 64 * 1024
_MAX_LINE_BYTES: Final = 64 * 1024 * 1024


class LayerMetadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """The metadata of one layer.

    Attributes:
        directory: the layer's name in layers/.
        implied_directories: paths as Latin-1 text, which maps each byte to a character, so that any path is valid
            JSON.
        committed_at: the time of the commit, in seconds since 1970. It is 0 in a baked store, where layers without
            an image are meant to stay: only layers with a time expire.
        encrypted: the blob was encrypted.
    """

    compressed_digest: str
    uncompressed_digest: str
    decoder: Decoder
    directory: str
    size_bytes: int
    entries: int
    implied_directories: list[str] = []
    committed_at: int = 0
    encrypted: bool = False

    @classmethod
    def of(cls, compressed_digest: Digest, directory: str, unpacked: UnpackedLayer) -> Self:
        """Return the metadata of a layer that was just unpacked."""
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
        """Return the layer that this metadata describes.

        Raises:
            InvalidDigest: a digest is malformed.
        """
        return StoredLayer(
            Digest(self.compressed_digest),
            Digest(self.uncompressed_digest),
            self.decoder,
            store_path,
            self.encrypted,
            self.size_bytes,
            self.implied_paths,
        )

    def encode(self) -> bytes:
        """Return the content of the file."""
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @property
    def implied_paths(self) -> tuple[bytes, ...]:
        """The implied directories as paths, without texts that are not Latin-1."""
        paths: list[bytes] = []
        for text in self.implied_directories:
            with suppress(UnicodeEncodeError):
                paths.append(text.encode("latin-1"))
        return tuple(paths)


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MetadataFiles:
    """The metadata of all layers in a work directory.

    Attributes:
        layers: the metadata of layers whose directories exist, by compressed digest.
        unused: names in records/ of metadata without a directory, or that newer metadata replaces.
        damaged: names in records/ of files that cannot be used, and why.
        has_old_file: layer_facts.jsonl exists.
        old_file_damage: why layer_facts.jsonl cannot be read; "" if it can, or does not exist.
    """

    layers: dict[str, LayerMetadata]
    unused: tuple[str, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    has_old_file: bool = False
    old_file_damage: str = ""


def read_metadata(
    work_dir: str, layers_names: Iterable[str] | None = None, records_names: Iterable[str] | None = None
) -> MetadataFiles:
    """Read the metadata of all layers in a work directory; nothing that cannot be read is an error.

    Args:
        work_dir: the work directory.
        layers_names: the names in layers/, if the caller has listed them.
        records_names: the names in records/, likewise.
    """
    directories = frozenset(
        _names(os.path.join(work_dir, "layers")) if layers_names is None else layers_names
    )
    layers, old_damage = _read_old_file(work_dir, directories)
    has_old_file = os.path.lexists(os.path.join(work_dir, OLD_FILE_NAME))
    found, unused, damaged = _read_files(os.path.join(work_dir, RECORDS), records_names, directories)
    newest: dict[str, LayerMetadata] = {}
    for one in found:
        other = newest.get(one.compressed_digest)
        if other is not None:
            one, other = sorted((one, other), key=_age, reverse=True)
            unused.append(other.directory + SUFFIX)
        newest[one.compressed_digest] = one
    return MetadataFiles(layers | newest, tuple(unused), tuple(damaged), has_old_file, old_damage)


def _age(metadata: LayerMetadata) -> tuple[int, int, str]:
    return metadata.committed_at, len(metadata.directory), metadata.directory


def _read_files(
    records: str, records_names: Iterable[str] | None, directories: Collection[str]
) -> tuple[list[LayerMetadata], list[str], list[tuple[str, str]]]:
    found: list[LayerMetadata] = []
    unused: list[str] = []
    damaged: list[tuple[str, str]] = []
    decode = msgspec.json.Decoder(LayerMetadata).decode
    listed = _names(records) if records_names is None else records_names
    names = [name for name in listed if name.endswith(SUFFIX)]
    if not names:
        return found, unused, damaged
    room = os.open(records, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            directory = name[: -len(SUFFIX)]
            if directory not in directories:
                unused.append(name)
                continue
            try:
                content = _read_small_file(name, room)
                if content is None:  # deleted meanwhile
                    continue
                metadata = decode(content)
            except (NotAFile, OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                damaged.append((name, str(error)))
                continue
            if metadata.directory == directory:
                found.append(metadata)
            else:
                damaged.append((name, "it describes another layer's directory"))
    finally:
        os.close(room)
    return found, unused, damaged


def _read_small_file(name: str, room: int) -> bytes | None:
    """Read a file like `read_file`, in three system calls: a start reads one file for each layer.

    A fifo or a device yields no metadata, so there is no need to ask first what the file is.
    """
    try:
        descriptor = os.open(name, _FILE, dir_fd=room)
    except OSError:
        return read_file(name, directory=room)
    try:
        content = os.read(descriptor, _SMALL_FILE_BYTES)
    finally:
        os.close(descriptor)
    return content if len(content) < _SMALL_FILE_BYTES else read_file(name, directory=room)


class _Gone(msgspec.Struct, frozen=True):
    """A line of layer_facts.jsonl that says that a layer was deleted."""

    gone: str


def _read_old_file(work_dir: str, directories: Collection[str]) -> tuple[dict[str, LayerMetadata], str]:
    try:
        lines = (read_file(os.path.join(work_dir, OLD_FILE_NAME)) or b"").split(b"\n")
    except NotAFile as error:
        return {}, str(error)
    except OSError:
        return {}, ""
    found: dict[str, LayerMetadata] = {}
    decoder = msgspec.json.Decoder(LayerMetadata)
    for line in lines:
        try:
            if line.startswith(b'{"gone":'):
                found.pop(msgspec.json.decode(line, type=_Gone).gone, None)
            elif line and len(line) <= _MAX_LINE_BYTES:
                one = decoder.decode(line)
                found[one.compressed_digest] = one
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return {digest: one for digest, one in found.items() if one.directory in directories}, ""


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


# -- writing ------------------------------------------------------------------------------------------------


def write_metadata(work_dir: str, durability: Durability, layers: Iterable[LayerMetadata]) -> None:
    """Replace the metadata files of some layers, then make all of them durable with one call.

    Raises:
        OSError: the operating system refuses.
    """
    records = os.path.join(work_dir, RECORDS)
    written = False
    for one in layers:
        durability.replace_unsynced(os.path.join(records, one.directory + SUFFIX), one.encode())
        written = True
    if written:
        durability.sync_tree(records)


def replace_old_file(work_dir: str, durability: Durability, layers: Iterable[LayerMetadata]) -> None:
    """Replace layer_facts.jsonl by a file for each layer. A crash at any point loses nothing.

    Raises:
        OSError: the operating system refuses.
    """
    write_metadata(work_dir, durability, layers)
    os.unlink(os.path.join(work_dir, OLD_FILE_NAME))
    durability.sync_names(work_dir)


# -- using --------------------------------------------------------------------------------------------------


def without_contradictions(
    metadata: Mapping[str, LayerMetadata], claims: Mapping[str, Collection[str]]
) -> dict[str, LayerMetadata]:
    """Return the metadata whose directories still belong to the layer.

    Another program may have reused a running number for another layer.

    Args:
        metadata: by compressed digest.
        claims: the layers that each directory in layers/ belongs to, according to their entries.
    """
    return {digest: one for digest, one in metadata.items() if digest in claims.get(one.directory, (digest,))}


def with_metadata(layer: StoredLayer, metadata: LayerMetadata | None) -> StoredLayer:
    """Return a layer with the fields that its metadata adds, if the metadata describes the same tar."""
    if metadata is None or metadata.uncompressed_digest != layer.uncompressed_digest:
        return layer
    return StoredLayer(
        layer.compressed_digest,
        layer.uncompressed_digest,
        layer.decoder,
        layer.store_path,
        layer.encrypted,
        metadata.size_bytes,
        metadata.implied_paths,
    )


def named_directory(entry: StoredLayer) -> str:
    """Return the name of the directory that an entry's store_path ends with."""
    name = entry.store_path.rpartition("/")[2]
    return name if name not in ("", ".", "..") else os.path.basename(os.path.normpath(entry.store_path))


def contradiction(entry: StoredLayer, metadata: LayerMetadata) -> str:
    """Return how a layer's entry differs from its metadata, or "".

    The parent directory may differ: a work directory is made at one path, and moved to or mounted at another.
    """
    if metadata.uncompressed_digest != entry.uncompressed_digest:
        return (
            f"it was unpacked from {metadata.uncompressed_digest}, but its entry has "
            f"{entry.uncompressed_digest}"
        )
    if named_directory(entry) != metadata.directory:
        return f"it is in layers/{metadata.directory}, but its entry has {entry.store_path[:100]!r}"
    return ""
