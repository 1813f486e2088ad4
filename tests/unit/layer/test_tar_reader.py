"""The tar reader, against Python's tarfile and GNU tar, and against tars that nobody should write."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.tar_entry import DIRECTORY, HARD_LINK, REGULAR, SYMLINK
from guestpull_server.layer.tar_reader import TarReader
from support import images
from support.images import RawTar, TarFormat, tar_of
from support.reading import Member, each_member, logical, members, pieces

# -- against tarfile ----------------------------------------------------------------------------------------

_NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40),
    st.binary(min_size=1, max_size=30)
    .filter(lambda name: b"\0" not in name and b"/" not in name)
    .map(lambda name: name.decode(errors="surrogateescape")),
)
_PATHS = st.lists(_NAMES, min_size=1, max_size=8).map("/".join)
_TYPES = st.sampled_from(
    [
        tarfile.REGTYPE,
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    ]
)


@st.composite
def _entries(draw: st.DrawFn, largest: int = 0o7777777) -> images.Entry:
    kind = draw(_TYPES)
    content = draw(st.binary(max_size=1500)) if kind == tarfile.REGTYPE else b""
    return images.entry(
        draw(_PATHS),
        kind,
        content=content,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(st.integers(0, largest)),
        gid=draw(st.integers(0, largest)),
        mtime=draw(st.integers(0, 1 << 33)),
        link=draw(_PATHS) if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "",
        device=draw(st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20)))
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE)
        else (0, 0),
    )


def _as_read(found: Member) -> tuple[object, ...]:
    entry = found.entry
    return (
        entry.path.rstrip(b"/"),
        entry.type,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.link_target,
        entry.device,
        entry.size,
        found.stored,
    )


def _as_written(one: images.Entry) -> tuple[object, ...]:
    header = one.header
    return (
        header.name.encode(errors="surrogateescape").rstrip(b"/"),
        header.type,
        header.mode,
        header.uid,
        header.gid,
        int(header.mtime) * 10**9,
        header.linkname.encode(errors="surrogateescape"),
        (header.devmajor, header.devminor),
        len(one.content),
        one.content,
    )


@settings(deadline=None, max_examples=60)
@given(
    entries=st.lists(_entries(), max_size=5),
    tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    piece=st.sampled_from([512, 700, 1 << 10, 10_000, 1 << 20]),
)
def test_what_tarfile_writes_is_read_as_it_was_meant(
    entries: list[images.Entry], tar_format: TarFormat, piece: int
) -> None:
    found = members(tar_of(entries, tar_format=tar_format), piece=piece)
    assert [_as_read(one) for one in found] == [_as_written(one) for one in entries]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_path_of_two_fields_is_put_together(tar_format: TarFormat) -> None:
    path = "/".join(["d" * 50] * 4) + "/f"
    assert members(tar_of([images.file(path)], tar_format=tar_format))[0].entry.path == path.encode()


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_numbers_that_octal_cannot_hold_are_read(tar_format: TarFormat) -> None:
    entry = images.file("f", uid=3_000_000_000, gid=4_000_000_000, mtime=1 << 40)
    found = members(tar_of([entry], tar_format=tar_format))[0].entry
    assert (found.uid, found.gid, found.mtime_ns) == (3_000_000_000, 4_000_000_000, (1 << 40) * 10**9)


def test_a_time_before_the_epoch_is_negative() -> None:
    found = members(tar_of([images.file("f", mtime=-7)], tar_format=tarfile.GNU_FORMAT))[0].entry
    assert found.mtime_ns == -7 * 10**9


def test_pax_times_keep_their_nanoseconds_and_atime() -> None:
    records = {"mtime": "1700000000.123456789", "atime": "1600000000.5"}
    found = members(tar_of([images.file("f", pax=records)]))[0].entry
    assert (found.mtime_ns, found.atime_ns) == (1_700_000_000_123_456_789, 1_600_000_000_500_000_000)


def test_extended_attributes_keep_every_byte() -> None:
    value = bytes(range(256))
    records = {
        "SCHILY.xattr.user.all": value.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.user.none": "",
    }
    found = members(tar_of([images.file("f", pax=records)]))[0].entry
    assert dict(found.xattrs) == {b"user.all": value, b"user.none": b""}


# -- against GNU tar ----------------------------------------------------------------------------------------


def _gnu_tar(directory: Path, *options: str) -> bytes:
    command = ["tar", "--create", "--directory", str(directory), "--sort=name", *options, "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    deep = top / ("long-directory-name-" * 6) / ("another-long-name-" * 7)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    (top / "empty").touch()
    (top / "block").write_bytes(b"b" * 512)
    (top / "more").write_bytes(os.urandom(100_001))
    (top / "link").symlink_to("x" * 150)
    (top / "hard").hardlink_to(top / "more")
    os.mkfifo(top / "pipe")
    (top / os.fsdecode(b"\xff\xfe not utf-8")).write_bytes(b"raw")
    os.utime(top / "block", ns=(1, 1_234_567_890_123_456_789))
    (top / "block").chmod(0o4711)
    return top


@pytest.mark.parametrize("tar_format", ["gnu", "oldgnu", "pax", "posix"])
@pytest.mark.parametrize("piece", [512, 1000, 1 << 20])
def test_what_gnu_tar_writes_is_the_tree_that_it_read(tree: Path, tar_format: str, piece: int) -> None:
    found = {
        os.path.normpath(one.entry.path): one
        for one in members(_gnu_tar(tree, f"--format={tar_format}"), piece=piece)
    }
    paths = {os.fsencode(path.relative_to(tree)) for path in tree.rglob("*")} | {b"."}
    assert found.keys() == paths
    for name, one in found.items():
        status = os.lstat(os.path.join(os.fsencode(tree), name))
        if one.entry.type != HARD_LINK:
            assert one.entry.mode == status.st_mode & 0o7777
        assert (one.entry.uid, one.entry.gid) == (status.st_uid, status.st_gid)
        assert one.entry.mtime_ns // 10**9 == status.st_mtime_ns // 10**9
        if one.entry.type == REGULAR:
            assert one.stored == Path(os.fsdecode(os.path.join(os.fsencode(tree), name))).read_bytes()
        if one.entry.type == SYMLINK:
            assert one.entry.link_target == os.readlink(os.path.join(os.fsencode(tree), name))
    links = {found[name].entry.type for name in (b"hard", b"more")}
    assert links == {HARD_LINK, REGULAR}


def test_pax_of_gnu_tar_keeps_nanoseconds(tree: Path) -> None:
    found = {one.entry.path: one.entry for one in members(_gnu_tar(tree, "--format=pax"))}
    assert found[b"./block"].mtime_ns == 1_234_567_890_123_456_789


def test_ustar_and_v7_of_gnu_tar_are_read(tmp_path: Path) -> None:
    top = tmp_path / "short"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "hostname").write_bytes(b"guest\n")
    for tar_format in ("ustar", "v7"):
        found = {one.entry.path: one for one in members(_gnu_tar(top, f"--format={tar_format}"))}
        assert found[b"./etc/"].entry.type == DIRECTORY
        assert found[b"./etc/hostname"].stored == b"guest\n"


_SPARSE_FORMS: dict[str, list[str]] = {
    "gnu": ["--format=gnu"],
    "oldgnu": ["--format=oldgnu"],
    "pax": ["--format=pax"],
}


def _write_sparse(path: Path, segments: int, size: int) -> None:
    with path.open("wb") as file:
        for number in range(segments):
            file.seek(number * size // max(segments, 1))
            file.write(bytes([1 + number % 255]) * 4096)
        file.truncate(size)


@pytest.mark.parametrize("options", _SPARSE_FORMS.values(), ids=_SPARSE_FORMS.keys())
@pytest.mark.parametrize("segments", [0, 1, 5, 300])
def test_sparse_files_of_gnu_tar_have_their_holes(tmp_path: Path, options: list[str], segments: int) -> None:
    top = tmp_path / "sparse"
    top.mkdir()
    _write_sparse(top / "disk", segments, 12_345_678)
    tar = _gnu_tar(top, "--sparse", *options)
    assert len(tar) < 3_000_000
    found = {one.entry.path: one for one in members(tar, piece=100_000)}
    assert found[b"./disk"].entry.size == 12_345_678
    whole = hashlib.sha256(logical(found[b"./disk"])).hexdigest()
    assert whole == hashlib.sha256((top / "disk").read_bytes()).hexdigest()


@pytest.mark.parametrize("version", ["0.0", "0.1"])
def test_sparse_formats_that_gnu_tar_gave_up_in_2006_are_refused_by_name(
    tmp_path: Path, version: str
) -> None:
    top = tmp_path / "sparse"
    top.mkdir()
    _write_sparse(top / "disk", 5, 1_000_000)
    with pytest.raises(TarError, match="a pax format other than GNU tar's"):
        members(_gnu_tar(top, "--sparse", "--format=pax", f"--sparse-version={version}"))


def test_what_is_only_named_like_a_sparse_file_is_a_plain_one() -> None:
    found = members(
        tar_of([images.file("GNU.sparse.map" * 10, b"content", pax={"comment": "GNU.sparse.major"})])
    )
    assert found[0].stored == b"content"


# -- as Go's archive/tar is ---------------------------------------------------------------------------------


def _raw(name: bytes, kind: bytes, content: bytes = b"", **fields: bytes) -> RawTar:
    """A ustar header and content as they are; `fields` are size, linkname, magic, prefix, checksum..."""
    places = {
        "mode": (100, 8),
        "size": (124, 12),
        "mtime": (136, 12),
        "linkname": (157, 100),
        "magic": (257, 8),
        "prefix": (345, 155),
    }
    header = bytearray(512)
    header[: len(name)] = name
    header[100:148] = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % len(content) + b"00000000000\0"
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    for field, value in fields.items():
        if field in places:
            start, length = places[field]
            header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = fields.get("checksum", b"%06o\0 " % sum(header))
    return RawTar(bytes(header) + content + bytes(-len(content) % 512))


def _pax(**records: str) -> RawTar:
    content = b"".join(
        _record(key.replace("__", ".").encode(), value.encode()) for key, value in records.items()
    )
    return _raw(b"pax", b"x", content)


def _record(key: bytes, value: bytes) -> bytes:
    tail = b" " + key + b"=" + value + b"\n"
    length = next(n for n in range(len(tail), len(tail) + 9) if len(str(n)) + len(tail) == n)
    return str(length).encode() + tail


def _paths(*entries: images.Entry | RawTar) -> list[bytes]:
    return [one.entry.path for one in members(tar_of(entries))]


def test_a_global_header_says_nothing_of_entries() -> None:
    tar = tar_of([_raw(b"g", b"g", _record(b"path", b"elsewhere")), _raw(b"f", b"0")])
    assert [one.entry.path for one in members(tar)] == [b"f"]


def test_a_global_header_ends_what_an_extended_header_said() -> None:
    assert _paths(_pax(path="x"), _raw(b"g", b"g", b""), _raw(b"f", b"0")) == [b"f"]


def test_a_second_extended_header_replaces_the_first() -> None:
    tar = tar_of([_pax(path="one", uid="7"), _pax(path="two"), _raw(b"f", b"0")])
    found = members(tar)[0].entry
    assert (found.path, found.uid) == (b"two", 0)


def test_a_gnu_long_name_wins_over_a_pax_path() -> None:
    assert _paths(_raw(b"L", b"L", b"long\0"), _pax(path="pax"), _raw(b"f", b"0")) == [b"long"]


def test_an_empty_pax_record_leaves_the_field_as_it_is() -> None:
    assert _paths(_pax(path="", uid="", mtime="", size=""), _raw(b"f", b"0")) == [b"f"]


def test_an_old_regular_file_whose_name_ends_in_a_slash_is_a_directory() -> None:
    assert members(tar_of([_raw(b"d/", b"\0")]))[0].entry.type == DIRECTORY


def test_the_whole_name_tells_an_old_directory() -> None:
    found = members(
        tar_of([_pax(path="d/"), _raw(b"d", b"\0", b"", size=b"00000001000\0"), _raw(b"f", b"0")])
    )
    assert [(one.entry.path, one.entry.type) for one in found] == [(b"d/", DIRECTORY), (b"f", REGULAR)]


def test_a_regular_file_stays_one_whatever_its_name() -> None:
    assert [
        one.stored
        for one in members(tar_of([_raw(b"d/", b"0", b"x"), _pax(path="e/"), _raw(b"f", b"0", b"y")]))
    ] == [b"x", b"y"]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_what_is_no_file_has_no_content_whatever_its_size_says(kind: bytes) -> None:
    tar = tar_of([_raw(b"d", kind, linkname=b"x", size=b"00000001000\0"), _raw(b"f", b"0", b"x")])
    assert [one.entry.path for one in members(tar)] == [b"d", b"f"]


def test_the_pax_size_is_the_size() -> None:
    tar = tar_of(
        [
            _pax(size="600"),
            _raw(b"f", b"0", b"", size=b"00000000001\0"),
            RawTar(b"y" * 600 + bytes(424)),
            _raw(b"g", b"0"),
        ]
    )
    assert [one.entry.size for one in members(tar)] == [600, 0]


def test_the_prefix_of_gnu_headers_is_no_part_of_the_path() -> None:
    assert _paths(_raw(b"f", b"0", magic=b"ustar  \0", prefix=b"00000000000\0")) == [b"f"]


@pytest.mark.parametrize("kind", [b"7", b"V", b"M", b"N", b"D", b"A", b"Z"])
def test_types_that_images_have_no_use_for_are_refused_by_name(kind: bytes) -> None:
    with pytest.raises(TarError, match=f"'odd' is of type '{kind.decode()}'"):
        members(tar_of([_raw(b"odd", kind)]))


def test_a_wrong_checksum_is_refused() -> None:
    with pytest.raises(TarError, match="checksum"):
        members(tar_of([_raw(b"f", b"0", checksum=b"0000001\0")]))


def test_a_checksum_of_signed_bytes_is_wrong() -> None:
    name = b"\xff\xfe"
    header = _raw(name, b"0").content[:512]
    signed = sum(header) - sum(header[148:156]) + 8 * 32 - 256 * 2
    with pytest.raises(TarError, match="checksum"):
        members(tar_of([_raw(name, b"0", checksum=b"%06o\0 " % signed)]))


def test_nothing_is_an_empty_tar() -> None:
    assert members(b"") == []


@pytest.mark.parametrize("end", [b"", bytes(512), bytes(1024), bytes(1024) + b"whatever follows" * 100])
def test_the_end_may_be_two_zero_blocks_or_one_or_none(end: bytes) -> None:
    assert [one.stored for one in members(_raw(b"f", b"0", b"x").content + end)] == [b"x"]


def test_the_padding_of_the_last_entry_may_be_missing() -> None:
    assert [one.stored for one in members(_raw(b"f", b"0", b"x" * 600).content[: 512 + 600])] == [b"x" * 600]


def test_a_zero_block_between_entries_is_refused() -> None:
    with pytest.raises(TarError, match="zero block"):
        members(_raw(b"f", b"0").content + bytes(512) + _raw(b"g", b"0").content)


@pytest.mark.parametrize("piece", [512, 1 << 20])
@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_a_tar_that_is_cut_short_is_refused(length: int, piece: int) -> None:
    with pytest.raises(TarError, match="cut short"):
        members(_raw(b"f", b"0", b"x" * 1000).content[:length], piece=piece)


def test_content_that_nobody_takes_is_skipped() -> None:
    tar = tar_of([images.file("a", b"a" * 5000), images.file("b", b"b" * 700), images.file("c")])
    assert [entry.path for entry in TarReader(pieces(tar, 1000), 1 << 20)] == [b"a", b"b", b"c"]


# -- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_an_extension_header_is_bounded(kind: bytes) -> None:
    with pytest.raises(LayerLimitExceeded) as raised:
        members(tar_of([_raw(b"big", kind, b"x" * 2000)]), max_header_bytes=1999)
    assert raised.value.limit == "max_header_bytes"


def test_an_extension_header_that_only_claims_to_be_large_costs_nothing() -> None:
    with pytest.raises(LayerLimitExceeded):
        members(tar_of([_raw(b"big", b"x", size=b"\x80" + bytes(6) + b"\x40" + bytes(4))]))


def test_the_map_of_a_sparse_file_is_bounded(tmp_path: Path) -> None:
    top = tmp_path / "sparse"
    top.mkdir()
    _write_sparse(top / "disk", 300, 12_345_678)
    for options in _SPARSE_FORMS.values():
        with pytest.raises(LayerLimitExceeded) as raised:
            members(_gnu_tar(top, "--sparse", *options), max_header_bytes=2000)
        assert raised.value.limit == "max_header_bytes"


_SPARSE_1_0 = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0"}


@pytest.mark.parametrize(
    "records",
    [
        _SPARSE_1_0,
        _SPARSE_1_0 | {"GNU__sparse__realsize": "-1"},
        _SPARSE_1_0 | {"GNU__sparse__realsize": "8"},
        _SPARSE_1_0 | {"GNU__sparse__realsize": str(1 << 63)},
        _SPARSE_1_0 | {"GNU__sparse__major": "2", "GNU__sparse__realsize": "9"},
        {"GNU__sparse__realsize": "9"},
        {"GNU__sparse__map": "0,9", "GNU__sparse__size": "9"},
    ],
)
def test_sparse_files_that_are_described_wrongly_are_refused(records: dict[str, str]) -> None:
    with pytest.raises(TarError):
        members(tar_of([_pax(**records), _raw(b"f", b"0", b"1\n0\n9\n".ljust(512, b"\0") + b"x" * 9)]))


@pytest.mark.parametrize(
    "content",
    [
        b"-1\n",
        b"1\n",
        b"2\n0\n5\n",
        b"1\n0\n5\n",
        b"x" * 512,
        b"9" * 512,
        b"1\n5\n5\n",
        b"\n",
        b"2\n5\n5\n0\n4\n",
        b"2\n0\n5\n3\n4\n",
        b"1\n0\n-9\n",
    ],
)
def test_maps_in_the_content_that_cannot_be_are_refused(content: bytes) -> None:
    head = _pax(**_SPARSE_1_0, GNU__sparse__realsize="9")
    with pytest.raises(TarError):
        members(tar_of([head, _raw(b"f", b"0", content.ljust(512, b"\0") + b"x" * 9)]))


# -- whatever comes -----------------------------------------------------------------------------------------


def _valid() -> bytes:
    entries: list[images.Entry | RawTar] = [
        images.directory("d"),
        images.file("d/f", b"f" * 700, pax={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}),
        images.symlink("s", "t" * 120),
        images.hardlink("h", "d/f"),
        _raw(b"L", b"L", b"n" * 200 + b"\0"),
        _raw(b"n", b"0", b"long"),
        images.sparse_file("sparse", {0: b"01234", 10: b"56789"}, 20),
    ]
    return tar_of(entries)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 12), cut=st.booleans())
def test_a_damaged_tar_is_read_or_refused_by_name(seed: int, count: int, cut: bool) -> None:
    source = random.Random(seed)
    tar = bytearray(_valid())
    for _ in range(count):
        start = (
            source.randrange(len(tar))
            if source.random() < 0.3
            else source.choice(range(0, len(tar), 512)) + source.randrange(512)
        )
        tar[start % len(tar)] = source.choice((0, 0x20, 0x30, 0x37, 0x80, 0xFF, source.randrange(256)))
    for start in range(0, len(tar), 512):  # without right checksums nothing behind the header is ever reached
        if tar[start + 257 : start + 262] == b"ustar":
            tar[start + 148 : start + 156] = b" " * 8
            tar[start + 148 : start + 156] = b"%06o\0 " % sum(tar[start : start + 512])
    if cut:
        del tar[source.randrange(len(tar)) :]
    with suppress(TarError, LayerLimitExceeded):
        members(bytes(tar), piece=source.choice((512, 513, 4096, 1 << 20)))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=2000))
def test_any_bytes_are_read_or_refused_by_name(content: bytes) -> None:
    with suppress(TarError, LayerLimitExceeded):
        members(content)


# -- recording ----------------------------------------------------------------------------------------------


class _Recorded:
    def __init__(self) -> None:
        self.everything = bytearray()
        self.literals = bytearray()
        self.contents: list[bytes] = []
        self.starts: list[int] = []
        """For each content, how many literal bytes are before it."""
        self._open = bytearray()

    def literal(self, piece: memoryview) -> None:
        self.everything += piece
        self.literals += piece

    def content(self, piece: memoryview, last: bool) -> None:
        self.everything += piece
        if not self._open:
            self.starts.append(len(self.literals))
        self._open += piece
        if last:
            self.contents.append(bytes(self._open))
            self._open.clear()


@pytest.mark.parametrize("piece", [512, 700, 4096, 1 << 20])
@pytest.mark.parametrize(
    "make", [_valid, lambda: _valid() + b"trailing" * 1000, lambda: _valid().rstrip(b"\0")]
)
def test_a_recorder_is_told_every_byte_in_order(make: Callable[[], bytes], piece: int) -> None:
    recorded = _Recorded()
    found = list(each_member(TarReader(pieces(make(), piece), 1 << 20, recorded)))
    assert recorded.everything == make()
    assert recorded.contents == [one.stored for one in found if one.stored]


def test_content_that_nobody_takes_is_literal() -> None:
    recorded = _Recorded()
    tar = _valid()
    for _ in TarReader(pieces(tar, 1000), 1 << 20, recorded):
        pass
    assert recorded.literals == tar


@pytest.mark.parametrize("piece", [512, 700, 1 << 20])
def test_a_tar_without_its_contents_reads_as_the_same_entries(piece: int) -> None:
    recorded, again = _Recorded(), _Recorded()
    written = list(each_member(TarReader(pieces(_valid() + b"trailing", 1000), 1 << 20, recorded)))
    reader = TarReader(pieces(bytes(recorded.literals), piece), 1 << 20, again)
    starts = iter(recorded.starts)
    found = [(entry, reader.omit_content()) for entry in reader]
    assert found == [(one.entry, next(starts) if one.stored else -1) for one in written]
    assert again.literals == recorded.literals
