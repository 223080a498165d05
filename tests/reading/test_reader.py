import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.packed_set import write_packed
from tests.helpers.small_set import photographs, write_set

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.reading import source
from pipeline.reading.quarantine import Quarantine, SampleError, StandIns
from pipeline.reading.source import ArchiveSource


@pytest.fixture
def index(tmp_path: Path) -> SampleIndex:
    return write_set(tmp_path, photographs(5))


def test_views_are_the_files_bytes(index: SampleIndex) -> None:
    reader, blobs = ArchiveSource(index), photographs(5)
    order = np.array([3, 0, 4, 0])
    for _ in range(3):  # the second and third time in memory used before
        views = reader.read_batch(order, np.zeros_like(order))
        assert [bytes(view) for view in views] == [blobs[id] for id in order]
        held = reader.read(1)
        del views
        reader.read_batch(order, np.zeros_like(order))
        assert bytes(held) == blobs[1]


def test_an_archive_cut_while_it_is_read_is_named(index: SampleIndex) -> None:
    reader, path = ArchiveSource(index), index.archive_path(0)
    reader.read(0)
    os.truncate(path, int(index.samples[4]["offset"]) + 100)
    reader.read(3)
    with pytest.raises(RuntimeError, match=rf"archive {path} \(=\d+ bytes\) ends within sample 4, and had \d+ bytes when it "
                                           r"was indexed; restore it, or build the index again"):
        reader.read(4)


def test_a_disk_that_fails_is_no_corrupt_sample(index: SampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(source, "_preadv", failing)
    with pytest.raises(RuntimeError, match=r"archive file \(=.*tar\) cannot be read .* its disk reports an error \(EIO\); look"):
        ArchiveSource(index).read(2)


def test_more_archives_than_files_may_be_open(tmp_path: Path) -> None:
    blobs = photographs(4) * 15
    index = write_packed(tmp_path, blobs, per_shard=1)
    assert len(index.archives) == 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, hard))
    try:
        reader, ids = ArchiveSource(index), np.arange(60)
        assert [bytes(view) for view in reader.read_batch(ids, ids)] == blobs
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_flipped_bit_of_a_file_is_found(index: SampleIndex) -> None:
    row = index.samples[2]
    path = index.archive_path(0)
    content = bytearray(path.read_bytes())
    for bit in range(0, int(row["size"]) * 8, 997):
        place = int(row["offset"]) + bit // 8
        content[place] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(SampleError, match=r"sample 2 \(=train_0002.JPEG in .*\) has another CRC-32"):
            ArchiveSource(index).read(2)
        if bit // 8 > 1000:  # behind the header
            assert len(ArchiveSource(index, check_crc=False).read(2)) == row["size"]
        content[place] ^= 1 << bit % 8


def test_an_index_without_crcs_is_not_checked(tmp_path: Path) -> None:
    index = write_set(tmp_path / "plain", photographs(2), crc32=False)
    assert len(ArchiveSource(index).read(0)) == index.samples[0]["size"]


def test_quarantine_counts_samples_once_and_remembers(index: SampleIndex, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    kept = Quarantine(2, path)
    for _ in range(3):
        kept.add(SampleError(index, 1, "is torn"), ArchiveSource(index), epoch=0, step=4)
    kept.add(SampleError(index, 3, "is torn"), ArchiveSource(index), epoch=0, step=5)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [1, 3]
    with open(path, "a") as file:
        file.write('{"id": 4, "mem')  # cut off by a kill
    assert Quarantine(2, path, process=1).ids == {1, 3} and not path.read_text().endswith("\n")
    again = Quarantine(2, path)
    assert again.ids == {1, 3}
    with pytest.raises(RuntimeError, match=r"quarantine \(=3 unreadable samples\) must not exceed its budget \(=2\); the last "
                                           r"one: sample 0 .* all in .*quarantine.jsonl; or raise"):
        again.add(SampleError(index, 0, "is torn"), ArchiveSource(index))
    last = Quarantine(2, path)
    assert last.ids == {0, 1, 3}  # the line after the one cut off is whole
    with pytest.raises(RuntimeError, match=r"quarantine \(=3 unreadable samples\) must not exceed"):
        last.add(SampleError(index, 1, "is torn"), ArchiveSource(index))  # starting again does not raise the budget


def test_what_cannot_be_read_now_gets_no_stand_in(index: SampleIndex) -> None:
    """It says nothing about the image: training ends, and nothing is recorded."""
    quarantine, source = Quarantine(9), ArchiveSource(index, np.arange(4))
    error = SampleError(index, 0, "cannot be read")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files", "x.JPEG")
    with pytest.raises(RuntimeError, match=r"sample 0: file \(=x.JPEG\) cannot be opened: this process has as many files open"):
        StandIns(0, quarantine, lambda *_: pytest.fail("a stand-in was planned")).choose(error, source, 0, 0, 0, 0)
    assert not quarantine.ids


def test_the_quarantine_of_several_processes_is_one(index: SampleIndex, tmp_path: Path) -> None:
    """Each writes what it finds, all count all of it, whoever found it and whenever they began."""
    path = tmp_path / "quarantine.jsonl"
    first, fourth = Quarantine(3, path), Quarantine(3, path, process=3)
    first.add(SampleError(index, 0, "is torn"), ArchiveSource(index), epoch=0)
    fourth.add(SampleError(index, 1, "is torn"), ArchiveSource(index), epoch=0)
    fourth.add(SampleError(index, 0, "is torn"), ArchiveSource(index), epoch=0)  # named already
    found = {file.name: [json.loads(line)["id"] for line in file.read_text().splitlines()] for file in tmp_path.glob("q*.jsonl")}
    assert found == {"quarantine.jsonl": [0], "quarantine-3.jsonl": [1]}
    with open(tmp_path / "quarantine-3.jsonl", "a") as file:
        file.write('{"id": 2, "me')  # being written: counts when it is whole
    first.add(SampleError(index, 3, "is torn"), ArchiveSource(index))
    assert first.ids == {0, 1, 3}
    with open(tmp_path / "quarantine-3.jsonl", "a") as file:
        file.write('mber": "x"}\n')
    with pytest.raises(RuntimeError, match=r"quarantine \(=4 unreadable samples\) must not exceed its budget \(=3\); the last "
                                           r"one: sample 1 .* all in .*quarantine\*.jsonl; or raise"):
        Quarantine(3, path, process=2).add(SampleError(index, 1, "is torn"), ArchiveSource(index))
    with pytest.raises(RuntimeError, match=r"quarantine \(=5 unreadable samples\)"):
        first.add(SampleError(index, 4, "is torn"), ArchiveSource(index))
    assert not (tmp_path / "quarantine-2.jsonl").exists() and Quarantine(3, path, process=9).ids == {0, 1, 2, 3, 4}


def test_settings_out_of_range_are_explained() -> None:
    for key, value, message in (("threads", -1, "at least 0"), ("prefetch", 0, "at least 1"), ("read_threads", -2, "at least 0"),
                                ("quarantine_budget", 1.5, "share between 0 and 1"), ("hw_decoder_load", -0.1, "share between")):
        with pytest.raises(ValueError, match=rf"machine.{key} \(={value}\) must be .*{message}"):
            LoaderConfig(**{key: value})
    good = {"region": "square", "square_px": 256, "crop_px": 227, "mirror": True, "lighting": 0.1, "mean": "image"}
    for key, bad, message in (("region", "middle", "one of square, full"), ("mean", "none", "one of image"),
                              ("square_px", 0, r"lie in 1…8192"), ("crop_px", 257, r"lie in 1…data.square_px \(=256\)"),
                              ("lighting", -1.0, "standard deviation"),
                              ("region", "full", "must not be image where data.region is full")):
        name = "mean" if (key, bad) == ("region", "full") else key
        with pytest.raises(ValueError, match=rf"data.{name} \(=.*{message}"):
            DataConfig(**{**good, key: bad})  # type: ignore[arg-type]
    assert np.isclose(DataConfig(**good).lighting, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("spoil, place", [(b"\x00\x00", 0), (b"\x00\x01\x00\x01", None)])
def test_without_a_crc_the_header_must_still_be_the_indexs(tmp_path: Path, spoil: bytes, place: int | None) -> None:
    """DALI dies of one that it cannot parse, and one of another size would be cut elsewhere."""
    blob = photographs(5)[2]
    place = blob.index(b"\xff\xc0") + 5 if place is None else place  # height and width
    index = write_set(tmp_path, photographs(5), crc32=False)
    with open(index.archive_path(0), "r+b") as file:
        file.seek(int(index.samples[2]["offset"]) + place)
        file.write(spoil)
    assert len(ArchiveSource(index).read(1)) == index.samples[1]["size"]
    with pytest.raises(SampleError, match=r"sample 2 \(=train_0002.JPEG in .*\) has another header than the index; run"):
        ArchiveSource(index).read(2)
