"""The decompressor driver: what it accepts, what it refuses, what it costs."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from guestpull_server.config import Limits
from guestpull_server.layer.inflate import decoder_of
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.models import Decoder, KiB, MiB
from support.images import Compression, compress, file, tar_of
from support.reading import inflate, inflating

_TAR = tar_of([file("a", random.Random(1).randbytes(3_000_000)), file("b", b"b" * 2_000_000)])
_COMPRESSIONS: list[Compression] = ["gzip", "zstd", "none"]
_DECODERS: dict[Compression, Decoder] = {
    "gzip": Decoder.GZIP,
    "zstd": Decoder.ZSTD,
    "none": Decoder.UNCOMPRESSED,
}


@pytest.mark.parametrize("members", [1, 7])
@pytest.mark.parametrize("compression", _COMPRESSIONS)
def test_the_tar_comes_out_with_its_digest(compression: Compression, members: int) -> None:
    inflated, inflater = inflate(compress(_TAR, compression, members=members))
    assert inflated == _TAR
    assert inflater.hexdigest == hashlib.sha256(_TAR).hexdigest()
    assert inflater.decoder is _DECODERS[compression]


@pytest.mark.parametrize("compression", _COMPRESSIONS)
def test_bytes_may_arrive_in_any_pieces(compression: Compression) -> None:
    blob = compress(_TAR[:50_000], compression)
    inflated, _ = inflate([blob[:1], blob[1:2], blob[2:3], blob[3:600], blob[600:]])
    assert inflated == _TAR[:50_000]


def test_a_plain_tar_is_hashed_only_on_demand() -> None:
    inflated, inflater = inflate(_TAR, hash_plain=False)
    assert (inflated, inflater.hexdigest) == (_TAR, "")


def test_a_compressed_tar_is_always_hashed() -> None:
    _, inflater = inflate(gzip.compress(_TAR), hash_plain=False)
    assert inflater.hexdigest == hashlib.sha256(_TAR).hexdigest()


def test_skippable_zstd_frames_are_skipped_wherever_they_are() -> None:
    skippable = b"\x5a\x2a\x4d\x18" + (1000).to_bytes(4, "little") + bytes(1000)
    frame = zstandard.ZstdCompressor().compress(_TAR)
    assert inflate(skippable + frame + skippable)[0] == _TAR


def test_a_gzip_header_may_have_every_field() -> None:
    deflated = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflated.compress(_TAR) + deflated.flush()
    header = b"\x1f\x8b\x08\x1c" + bytes(6) + (5).to_bytes(2, "little") + b"extra" + b"name\0" + b"comment\0"
    trailer = zlib.crc32(_TAR).to_bytes(4, "little") + len(_TAR).to_bytes(4, "little")
    assert inflate(header + body + trailer)[0] == _TAR


@pytest.mark.parametrize("field", [b"\x08", b"\x10"], ids=["name", "comment"])
def test_a_gzip_header_without_an_end_is_refused(field: bytes) -> None:
    header = b"\x1f\x8b\x08" + field + bytes(6)
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate([header, *[b"n" * MiB] * 4])


def test_nothing_at_all_is_an_empty_plain_stream() -> None:
    inflated, inflater = inflate(b"")
    assert (inflated, inflater.decoder) == (b"", Decoder.UNCOMPRESSED)


@pytest.mark.parametrize(
    ("blob", "name"),
    [(bz2.compress(_TAR), "bzip2"), (lzma.compress(_TAR), "xz"), (b"PK\x03\x04" + _TAR, "zip")],
    ids=["bzip2", "xz", "zip"],
)
def test_other_compressions_are_refused_by_name(blob: bytes, name: str) -> None:
    with pytest.raises(TarError, match=name):
        inflate(blob)


@pytest.mark.parametrize("name", ["BZhello", "PK\x03\x04"])
def test_a_tar_whose_first_name_looks_like_a_compression_is_a_tar(name: str) -> None:
    assert decoder_of(tar_of([file(name)])) is Decoder.UNCOMPRESSED


# -- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_gzip_stream_that_is_cut_short_is_refused(kept: float) -> None:
    blob = gzip.compress(_TAR)
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(blob[: int(len(blob) * kept)])


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_a_gzip_stream_without_all_of_its_trailer_is_refused(missing: int) -> None:
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(gzip.compress(_TAR)[:-missing])


def test_a_gzip_stream_with_a_wrong_checksum_is_refused() -> None:
    blob = bytearray(gzip.compress(_TAR))
    blob[-6] ^= 1
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(bytes(blob))


def test_garbage_behind_gzip_is_refused_as_go_refuses_it() -> None:
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(gzip.compress(_TAR) + b"garbage behind the end")


def test_garbage_behind_zstd_is_refused() -> None:
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(zstandard.ZstdCompressor().compress(_TAR) + b"garbage behind the end")


def test_a_zstd_frame_with_a_wrong_checksum_is_refused() -> None:
    blob = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(_TAR))
    blob[-1] ^= 1
    with pytest.raises(TarError, match="cannot be decompressed"):
        inflate(bytes(blob))


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 1 << 32), compression=st.sampled_from(["gzip", "zstd"]))
def test_damaged_streams_are_inflated_or_refused_by_name(seed: int, compression: Compression) -> None:
    source = random.Random(seed)
    blob = bytearray(compress(_TAR[2_900_000:3_100_000], compression, members=2))
    for _ in range(source.randrange(1, 6)):
        blob[source.randrange(min(len(blob), source.choice((20, 500, len(blob)))))] = source.randrange(256)
    with suppress(TarError, LayerLimitExceeded):
        inflate(bytes(blob))


@settings(deadline=None, max_examples=100)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]),
)
def test_any_bytes_are_inflated_or_refused_by_name(content: bytes, magic: bytes) -> None:
    with suppress(TarError, LayerLimitExceeded):
        inflate(magic + content)


# -- bombs --------------------------------------------------------------------------------------------------


def _bomb(compression: Compression, size: int) -> bytes:
    zeros = bytes(4 * MiB)
    if compression == "zstd":
        compressor = zstandard.ZstdCompressor(level=19).compressobj(size=size)
    else:
        compressor = zlib.compressobj(9, zlib.DEFLATED, 31)  # type: ignore[assignment]
    return b"".join(compressor.compress(zeros) for _ in range(size // len(zeros))) + compressor.flush()


def _memory() -> int:
    """The most memory that this process had at once, since it was last asked for or began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(line for line in lines if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")  # what earlier tests had would hide what is used now
    return int(most.split()[1]) * KiB


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_costs_no_memory(compression: Compression) -> None:
    blob = _bomb(compression, 400 * MiB)
    _memory()
    before = _memory()  # what it has now
    inflater = inflating(blob, Limits(max_compression_ratio=1_000_000))
    inflated = 0
    while (chunk := inflater.next_chunk()) is not None:
        inflated += len(chunk)
    assert inflated == 400 * MiB
    assert _memory() - before < 32 * MiB


@pytest.mark.parametrize(
    ("make", "limits", "limit"),
    [
        (lambda: _bomb("zstd", 256 * MiB), Limits(), "max_compression_ratio"),
        (lambda: _bomb("gzip", 256 * MiB), Limits(max_compression_ratio=100), "max_compression_ratio"),
        (
            lambda: _bomb("gzip", 16 * MiB),
            Limits(max_layer_bytes=1 * MiB, max_layer_entries=100),
            "max_layer_bytes",
        ),
        (
            lambda: zstandard.ZstdCompressor(
                compression_params=zstandard.ZstdCompressionParameters(window_log=27)
            ).compress(bytes(200 * MiB)),
            Limits(max_zstd_window_bytes=64 * MiB),
            "max_zstd_window_bytes",
        ),
    ],
    ids=["zstd", "gzip", "tar", "window"],
)
def test_what_expands_too_much_is_refused_by_the_limit_that_it_exceeds(
    make: Callable[[], bytes], limits: Limits, limit: str
) -> None:
    with pytest.raises(LayerLimitExceeded) as raised:
        inflate(make(), limits)
    assert raised.value.limit == limit
