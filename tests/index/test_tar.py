"""The walk lists what tarfile lists, and turns every damage into an error or an oddity: never into a shorter list."""
import gzip
import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from pipeline.index.tar import (MAX_ZERO_TAIL, ArchiveError, ByteWindow, Member, fingerprint, open_tar, read_member,
                                refuse_compressed, walk)
from tests.helpers.tars import END, block, member, padded, pax, save, tar_bytes

LONG = "folder/" + "x" * 180 + "/image.JPEG"  # beyond the 100 bytes of a header and the 255 of a prefix


def listed(path: Path, data: bytes) -> list[Member]:
    with open_tar(save(path, data)) as source:
        return list(walk(source))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_equals_tarfile(path: Path, format: int) -> None:
    files = {"a.JPEG": b"1" * 700, "empty": b"", "folder/b.JPEG": b"2" * 512, "d/" * 30 + "e" * 60 + "/c.JPEG": b"3" * 3}
    if format != tarfile.USTAR_FORMAT:
        files |= {LONG: b"4" * 1025, "ü/é.JPEG": b"5", LONG + "2": b"6" * 99999}
    data = tar_bytes(files, format)
    found = listed(path, data)
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    assert {m.name: data[m.offset:m.offset + m.size] for m in found} == files
    with open_tar(path) as source:
        assert [read_member(source, m.header) for m in found] == found  # names are read back from `header`


def test_inner_tar_is_walked_in_its_own_bounds(path: Path) -> None:
    inner = tar_bytes({"x": b"1" * 600, "y": b"2"})
    with open_tar(save(path, tar_bytes({"n1.tar": inner, "n2.tar": inner}))) as source:
        for outer in walk(source):
            found = list(walk(source, outer.offset, outer.offset + outer.size, outer.name))
            assert [(m.name, source.at(m.offset, m.size)) for m in found] == [("x", b"1" * 600), ("y", b"2")]
        with pytest.raises(ArchiveError, match=r"archive \(=n2.tar in .*a.tar\) ends at offset \d+ without its "):
            list(walk(source, outer.offset, outer.offset + 1536, outer.name))


def test_every_flipped_header_bit_is_an_error_or_changes_nothing(path: Path) -> None:
    data = tar_bytes({"a.JPEG": b"1" * 700, LONG: b"2" * 10, "c.JPEG": b"3" * 512})
    whole = listed(path, data)
    headers = sorted({h for m in whole for h in range(m.header, m.offset, 512)} - {whole[1].header + 512})
    harmless = 0
    for at in [byte for header in headers for byte in range(header, header + 512)]:
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            source = FromBytes(flipped)
            try:
                assert list(walk(source)) == whole, (at, bit)
                harmless += 1
            except ArchiveError as error:
                assert "a.tar" in str(error) and "offset" in str(error)
    assert 0 < harmless < 4 * 60  # only in the checksum field itself, behind its digits or in its leading zero


def test_every_flipped_bit_after_the_members_is_an_error(path: Path) -> None:
    data = member(b"a", b"1") + END
    for at in range(1024, 2048):
        for bit in (0, 7):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(ArchiveError, match="has checksum|has bytes after its end-of-archive mark"):
                list(walk(FromBytes(flipped)))


def test_flips_in_a_long_name_or_pax_header_never_shorten_the_list() -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_bytes({LONG: b"2" * 10, "c.JPEG": b"3"}, format)
        whole = list(walk(FromBytes(data)))
        for at in range(512, 1024):
            for bit in range(8):
                flipped = bytearray(data)
                flipped[at] ^= 1 << bit
                try:
                    found = list(walk(FromBytes(flipped)))
                except ArchiveError:
                    continue
                assert [m[1:4] for m in found] == [m[1:4] for m in whole], (at, bit)


def test_truncated_anywhere_is_an_error(path: Path) -> None:
    data = tar_bytes({"a": b"1" * 700, LONG: b"2" * 10, "c": b"3" * 2000})
    end = list(walk(FromBytes(data)))[-1]
    marked = end.offset + 2048 + 1024  # with the two zero blocks
    for cut in [*range(512, marked, 512), *range(1, marked, 97)]:
        with pytest.raises(ArchiveError, match="truncated"):
            list(walk(FromBytes(data[:cut])))
    assert len(list(walk(FromBytes(data[:marked])))) == 3


@pytest.mark.parametrize(("size", "message"), [
    (b"\xff" + b"\xff" * 9 + b"\xfe\x00", r"size \(=.*\) in .* at offset 0 is not a number from 0 up"),
    (b"-0000001000", "is not a number from 0 up"), (b"00000000o17", "is not a number from 0 up"),
    (b"00000000089", "is not a number from 0 up"), (b"0000_001000", "is not a number from 0 up"),
    (b"\x80" + bytes(3) + b"\x7f" * 8, r"needs \d+ bytes but the archive ends at 2048; it is truncated"),
    (b"77777777777", "it is truncated")])
def test_hostile_sizes(size: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        list(walk(FromBytes(block(b"x", size) + END + bytes(512))))


def test_base_256_and_pax_sizes() -> None:
    found = list(walk(FromBytes(block(b"x", b"\x80" + (700).to_bytes(11, "big")) + padded(b"1" * 700) + END)))
    assert found == [Member("x", "file", 512, 700, 0)]
    data = pax({"size": "700", "path": "p", "mtime": "1.5"}) + block(b"x", 0) + padded(b"1" * 700) + END
    assert list(walk(FromBytes(data))) == [Member("p", "file", 1536, 700, 0)]


@pytest.mark.parametrize(("records", "message"), [
    ({"size": "-512"}, r"PAX size \(=b'-512'\) of .* at offset 0 is not a number"),
    ({"GNU.sparse.major": "1"}, r"PAX record \(=GNU.sparse.major\) .* a sparse file, which cannot be indexed in place; "
                                "extract the archive")])
def test_hostile_pax(records: dict[str, str], message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        list(walk(FromBytes(pax(records) + member(b"x", b"1") + END)))


@pytest.mark.parametrize("payload", [b"0 path=x\n", b"99 path=x\n", b"path=x\n", b"9 path=xy", b"8 pathx\n", b"-9 path=\n",
                                     b"11 path=xy\n\x01"])
def test_malformed_pax(payload: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"PAX record \(=.*\) of .* at offset 0 is malformed"):
        list(walk(FromBytes(member(b"x", payload, kind=b"x") + member(b"x", b"1") + END)))


def test_global_pax_headers_are_passed_over_unless_they_rename() -> None:
    data = pax({"comment": "abc"}, b"g")
    assert list(walk(FromBytes(data * 20 + member(b"x", b"1") + data + END))) == [Member("x", "file", 20992, 1, 20480)]
    with pytest.raises(ArchiveError, match=r"PAX record \(=path\) .* describes a path or size for all members"):
        list(walk(FromBytes(pax({"path": "y"}, b"g") + member(b"x", b"1") + END)))


def test_endless_and_oversized_extensions() -> None:
    long_name = member(b"././@LongLink", b"a" * 200, kind=b"L")
    with pytest.raises(ArchiveError, match="has two long names"):
        list(walk(FromBytes(long_name * 2 + member(b"x", b"1") + END)))
    with pytest.raises(ArchiveError, match=r"extended header \(='K', 1 bytes, number 9\) .* in a row"):
        list(walk(FromBytes(member(b"x", b"t", kind=b"K") * 9 + member(b"x", b"1") + END)))
    with pytest.raises(ArchiveError, match="exceeds 1048576 bytes"):
        list(walk(FromBytes(block(b"x", 2 << 20, b"L") + END)))
    with pytest.raises(ArchiveError, match=r"extended header \(of .*\) at offset 0 is followed by no member"):
        list(walk(FromBytes(long_name + END)))


@pytest.mark.parametrize(("kind", "message"), [
    (b"S", r"member \(=x\) of .* at offset 0 is sparse .* extract the archive and index the folder"),
    (b"M", "continues another volume"), (b"Q", "has the unknown type b'Q'")])
def test_members_not_in_one_piece(kind: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        list(walk(FromBytes(member(b"x", b"1", kind=kind) + END)))


def test_a_sparse_file_as_gnu_tar_stores_it(tmp_path: Path, path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(4 << 20)
        file.seek(1 << 20)
        file.write(b"x")
    for format in ("gnu", "posix"):
        assert os.system(f"tar -C {tmp_path} --format={format} -cSf {path} hole") == 0
        with open_tar(path) as source, pytest.raises(ArchiveError, match="sparse"):
            list(walk(source))


def test_links_devices_and_folders_are_reported() -> None:
    data = b"".join(block(name, 0, kind) for name, kind in [
        (b"d/", b"5"), (b"old/", b"\0"), (b"hard", b"1"), (b"soft", b"2"), (b"tty", b"3"), (b"disk", b"4"), (b"pipe", b"6")])
    found = list(walk(FromBytes(block(b"label", 0, b"V") + data + member(b"./x", b"1", kind=b"7") + END)))
    assert [(m.name, m.kind) for m in found] == [
        ("d/", "directory"), ("old/", "directory"), ("hard", "link"), ("soft", "link"), ("tty", "device"),
        ("disk", "device"), ("pipe", "device"), ("x", "file")]
    with pytest.raises(ArchiveError, match=r"member \(=l\) .* is a link of 5 bytes, which must be 0"):
        list(walk(FromBytes(block(b"l", 5, b"2") + END * 2)))


def test_names() -> None:
    ustar = list(walk(FromBytes(member(b"x", b"1", prefix=b"a/b") + END)))
    assert ustar[0].name == "a/b/x"
    gnu = list(walk(FromBytes(member(b"x", b"1", prefix=b"12345", magic=b"ustar  \0") + END)))
    assert gnu[0].name == "x"  # GNU keeps times where ustar keeps the prefix
    with pytest.raises(ArchiveError, match=r"member \(=''\) of .* has no usable name"):
        list(walk(FromBytes(member(b"", b"1") + END)))
    assert list(walk(FromBytes(member(b"\xff.JPEG", b"1") + END)))[0].name == os.fsdecode(b"\xff.JPEG")


def test_what_follows_the_end_mark() -> None:
    one = member(b"x", b"1")
    assert len(list(walk(FromBytes(one + bytes(10240))))) == 1
    with pytest.raises(ArchiveError, match="has bytes after its end-of-archive mark at offset 1024: tars joined"):
        list(walk(FromBytes((one + END) * 2)))
    with pytest.raises(ArchiveError, match="ends at offset 1536 inside its end-of-archive mark"):
        list(walk(FromBytes(one + bytes(512))))
    with pytest.raises(ArchiveError, match=r"ends with \d+ zero bytes from offset 1024, .* an unfinished download"):
        list(walk(FromBytes(one + bytes(MAX_ZERO_TAIL + 512))))


@pytest.mark.parametrize(("head", "message"), [
    (b"\x1f\x8b\x08" + bytes(600), r"archive \(=.*a.tar\) is gzip-compressed.* decompress it first: gunzip -k .*a.tar"),
    (b"BZh9" + bytes(600), "bunzip2 -k"), (b"\xfd7zXZ\0" + bytes(600), "unxz -k"), (b"\x28\xb5\x2f\xfd" + bytes(600), "unzstd"),
    (b"PK\x03\x04" + bytes(600), "is zip-compressed"), (b"", r"is empty \(0 bytes\); fetch it again"),
    (b"<html>not found</html>" * 40, "it is no tar archive, or damaged at its start: fetch it again"),
    (b"short", "ends at offset 5 without its end-of-archive mark")])
def test_files_that_are_no_tar(path: Path, head: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message):
        listed(path, head)


def test_missing_and_folder_paths(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"archive \(=.*none.tar\) does not exist; give the path"):
        open_tar(tmp_path / "none.tar")
    with pytest.raises(ArchiveError, match=r"archive \(=.*\) is not a file"):
        open_tar(tmp_path)


def test_gzip_inner_tar(path: Path) -> None:
    packed = gzip.compress(tar_bytes({"x": b"1"}))
    with open_tar(save(path, tar_bytes({"n1.tar": packed}))) as source:
        with pytest.raises(ArchiveError, match=r"inner tar \(=n1.tar\) of .* at offset 512 is gzip-compressed"):
            refuse_compressed(source.at(512, 8), f"inner tar (=n1.tar) of {path} at offset 512", "n1.tar")


def test_random_rubbish_never_hangs_and_never_raises_anything_else() -> None:
    """2,000 tars with random bytes changed; checksums put right again, so that the fields behind them are reached."""
    chance = random.Random(5)
    data = tar_bytes({"a": b"1" * 700, LONG: b"2" * 10, "c": b"3" * 2000}, tarfile.GNU_FORMAT)
    errors = 0
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(data) // 2)] = chance.randrange(256)
        for at in range(0, 512 * 6, 512):
            if changed[at + 257:at + 262] == b"ustar":
                total = sum(changed[at:at + 148]) + sum(changed[at + 156:at + 512]) + 256
                changed[at + 148:at + 156] = b"%06o\0 " % total
        try:
            for found in walk(FromBytes(changed)):
                assert 0 <= found.offset <= found.offset + found.size <= len(changed)
        except ArchiveError:
            errors += 1
    assert errors > 100


def test_fingerprint_sees_ends_and_size(path: Path) -> None:
    data = bytearray(os.urandom(300_000))
    first = fingerprint(save(path, data))
    assert fingerprint(path) == first
    for at in (0, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        assert fingerprint(save(path, changed)) != first
    assert fingerprint(save(path, data + b"\0")) != first


def test_window_reads_like_the_file(path: Path) -> None:
    data = os.urandom(5000)
    with ByteWindow(save(path, data), window=100) as source:
        for offset, count in [(0, 10), (50, 60), (4990, 50), (0, 5000), (3, 0), (4000, 100), (10, 90), (6000, 5)]:
            assert source.at(offset, count) == data[offset:offset + count]


class FromBytes(ByteWindow):
    """A window over bytes, so that thousands of damaged archives need no file."""

    def __init__(self, data: bytes) -> None:
        self.path, self.size, self._file, self.window = Path("a.tar"), len(data), -1, 512
        self._data = io.BytesIO(data)
        self._start, self._bytes = 0, bytes(data)

    def _read(self, offset: int, count: int) -> bytes:
        self._data.seek(offset)
        return self._data.read(count)
