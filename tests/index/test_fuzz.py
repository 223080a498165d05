"""Readers of headers, fed with anything: an answer or a one-line error, and it ends. Few examples, the same every time."""
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.index.header import MAGIC, VERSION, Header, content_sha256, read_header
from pipeline.index.image_header import NeedMore, probe
from pipeline.index.tar import ArchiveError, Member, open_tar, walk
from pipeline.schema import read_as
from tests.helpers.small_set import encode, picture
from tests.helpers.tars import END, block, padded, pax, tar_bytes
from tools.cli import printable

FUZZ = settings(max_examples=60, derandomize=True, deadline=None, database=None)
NAMES = st.sampled_from(["name", "first", "count", "path", "size", "file", "id", "x"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé1./", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8)
KEYS = ["preset", "samples", "crc32", "splits", "archives", "reasons", "oddities", "classes", "files", "derived", "packed"]
GOOD = {"preset": "classes", "samples": 0, "crc32": True, "splits": [], "archives": [], "reasons": {}, "oddities": [],
        "classes": [], "files": {"samples": {"file": "samples.npy", "size": 128, "sha256": "0" * 64}}}
PICTURES = [encode(picture(1, 20, 30)), encode(picture(2, 20, 30), "PNG"), encode(picture(3, 20, 30), "WEBP"),
            encode(picture(4, 20, 30), "BMP"), encode(picture(5, 20, 30), "GIF"),
            encode(picture(6, 20, 30), quality=80, progressive=True)]
TAR = tar_bytes({"a/b.jpg": b"x" * 600, "n" * 200 + ".jpg": b"y"})


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), st.booleans())
def test_index_headers(change: dict[str, Any], resigned: bool) -> None:
    header = {**GOOD, **change, "magic": MAGIC, "version": VERSION}
    header["sha256"] = content_sha256(header) if resigned else "0"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.json").write_text(json.dumps(header))
        try:
            read_header(Path(folder))
        except ValueError as error:
            assert str(error).startswith("index header (=") and "\n" not in str(error)


@FUZZ
@given(JSON)
def test_schemas(value: Any) -> None:
    try:
        assert isinstance(read_as(Header, value, "header"), Header)
    except ValueError as error:
        assert str(error).startswith("header") and len(str(error)) < 300


@FUZZ
@given(st.sampled_from(PICTURES), st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6), st.integers(0, 400),
       st.booleans())
def test_image_headers(whole: bytes, changes: list[tuple[int, int]], length: int, complete: bool) -> None:
    data = bytearray(whole[:length])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    try:
        info = probe(bytes(data), complete)
    except NeedMore:
        assert not complete
        return
    assert (info.problem in ("", "too_large", "unsupported")) == (info.width > 0 and info.height > 0 and info.channels > 0)


def listed(data: bytes) -> list[Member] | None:
    """The members of a tar; None when it is refused."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(data)
        file.flush()
        try:
            with open_tar(file.name) as source:
                return list(walk(source))
        except ArchiveError as error:
            assert "\n" not in printable(error)
            return None


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(TAR) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(TAR)))
def test_tars_with_other_bytes(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(TAR[:length])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    members = listed(bytes(data))
    assert members is None or len(members) == 2


@FUZZ
@given(st.lists(st.tuples(st.binary(max_size=100), st.integers(0, 2000) | st.binary(max_size=12),
                          st.sampled_from(b"01234567\x00LKxgXSMVZ"), st.binary(max_size=60)), max_size=4),
       st.dictionaries(st.sampled_from(["path", "size", "GNU.sparse.major", "mtime"]), st.text("aé1=\n", max_size=8), max_size=2))
def test_crafted_tars(headers: list[tuple[bytes, int | bytes, int, bytes]], records: dict[str, str]) -> None:
    """Right checksums around anything: a listing that lies within the archive, or a refusal."""
    data = pax(records) if records else b""
    for name, size, kind, payload in headers:
        data += block(name, size, bytes([kind])) + padded(payload)
    data += END
    for member in listed(data) or ():
        assert 0 <= member.header < member.offset <= member.offset + member.size <= len(data)
