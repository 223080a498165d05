"""The index on disk: whole or not at all, checked on load, found again after a move."""
import gc
import os
import pickle
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.files import difference
from pipeline.index.header import Archive, ClassInfo
from pipeline.index.sample_index import REASONS, SAMPLE, SampleIndex
from pipeline.index.tar import fingerprint, open_tar, walk
from pipeline.index.writer import check_output, mark_excluded, write_index
from tests.helpers.indexes import altered, built, file_entry, jpeg, with_rows
from tests.helpers.tars import save, tar_bytes

FILES = {"n1/a.JPEG": b"aaa", "n2/b.JPEG": b"bbbb", "x/" * 80 + "c.JPEG": b"c" * 600, "d.JPEG": b"dd"}


def write(folder: Path, **changes: object) -> SampleIndex:
    """Four rows, train and val, in a tar with a long name."""
    path = save(folder / "images.tar", tar_bytes(FILES))
    with open_tar(path) as source:
        members = list(walk(source))
    rows = np.zeros(4, SAMPLE)
    for row, member in zip(rows, members):
        row["offset"], row["size"], row["header_blocks"] = member.offset, member.size, (member.offset - member.header) // 512
    rows["split"], rows["label"] = [0, 0, 0, 1], [0, 1, 1, 0]
    arguments: dict = {"classes": [ClassInfo("n1", "cat"), ClassInfo("n2", "dog")], "splits": ["train", "val"],
                       "archives": [Archive(path, path.stat().st_size, fingerprint(path), "tar")], "preset": "classes",
                       "crc32": False, "oddities": [{"id": 1, "name": "b", "split": "train", "reason": "cmyk", "kept": True}]}
    rows["reason"][1] = REASONS.index("cmyk")
    write_index(folder / "index", rows, **{**arguments, **changes})
    return SampleIndex.load(folder / "index")


def test_round_trip(tmp_path: Path) -> None:
    index = write(tmp_path)
    assert len(index) == 4 and index.split_names == ["train", "val"]
    assert index.ids("train").tolist() == [0, 1, 2] and index.ids("val").tolist() == [3]
    assert index.ids("val").dtype == np.int64 and SAMPLE.itemsize == 40
    assert [index.name(id) for id in range(4)] == list(FILES)
    assert [index.read(id) for id in range(4)] == list(FILES.values())
    assert index.classes[1] == ClassInfo("n2", "dog")
    assert isinstance(index.samples, np.memmap) and not index.samples.flags.writeable
    assert sorted(os.listdir(tmp_path)) == ["images.tar", "index"]
    assert sorted(os.listdir(tmp_path / "index")) == ["index.json", "samples.npy"]
    copy = pickle.loads(pickle.dumps(index))
    assert copy.sha256 == index.sha256 and len(pickle.dumps(index)) < 500


def test_the_folders_above_an_index_are_made(tmp_path: Path) -> None:
    assert write(tmp_path).sha256 == write(tmp_path / "b").sha256
    path = tmp_path / "a/b/index"
    index = SampleIndex.load(tmp_path / "index")
    write_index(path, np.array(index.samples), classes=index.classes, archives=index.archives, splits=index.split_names,
                preset="classes", crc32=False)
    assert len(SampleIndex.load(path)) == 4 and os.listdir(path.parent) == ["index"]


def test_hash_is_that_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert one.sha256 == two.sha256
    assert write(tmp_path / "three", classes=[ClassInfo("n1", "cat"), ClassInfo("n2", "wolf")]).sha256 != one.sha256


def test_lookups_out_of_range(tmp_path: Path) -> None:
    index = write(tmp_path)
    with pytest.raises(ValueError, match=r"split \(=test\) is not in the index .*index; it has train, val"):
        index.ids("test")
    for id in (-1, 4):
        with pytest.raises(ValueError, match=rf"id \(={id}\) is not in the index .*; ids go from 0 to 3"):
            index.name(id)


def test_archives_that_moved_or_changed(tmp_path: Path) -> None:
    index = write(tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(tmp_path / "images.tar", moved / "images.tar")
    index = SampleIndex.load(index.path)
    with pytest.raises(ValueError, match=r"archive \(=.*images.tar\) is not there; name the folder that holds it with"):
        index.archive_path(0)
    (tmp_path / "images.tar").mkdir()
    with pytest.raises(ValueError, match=r"archive \(=.*images.tar\) is no file any more; name the folder that holds it with"):
        index.archive_path(0)
    (tmp_path / "images.tar").rmdir()
    with pytest.raises(ValueError, match=rf"is not there, nor in {tmp_path};"):
        SampleIndex.load(index.path, tmp_path).archive_path(0)
    assert SampleIndex.load(index.path, moved).archive_path(0) == moved / "images.tar"
    assert pickle.loads(pickle.dumps(SampleIndex.load(index.path, [tmp_path, moved]))).name(0) == "n1/a.JPEG"
    with pytest.raises(ValueError, match=r"archives \(=.*none\) is not a folder"):
        SampleIndex.load(index.path, tmp_path / "none")
    data = (moved / "images.tar").read_bytes()
    for other in (data + bytes(512), b"m" + data[1:]):  # of another size; of the same size, another set
        save(moved / "images.tar", other)
        with pytest.raises(ValueError, match=rf"nor in {moved} \({moved}/images.tar has another size or content\); name the"):
            SampleIndex.load(index.path, moved).name(0)
    save(tmp_path / "images.tar", data + bytes(512))
    with pytest.raises(ValueError, match=r"archive \(=.*\) has \d+ bytes, but had \d+ when it was indexed; restore it, or"):
        SampleIndex.load(index.path, moved).name(0)


def test_one_folder_serves_archives_of_the_same_name(tmp_path: Path) -> None:
    one, two = write(tmp_path / "set/train"), write(tmp_path / "set/val")
    os.rename(tmp_path / "set", tmp_path / "moved")
    for kind in ("train", "val"):
        index = SampleIndex.load(tmp_path / f"moved/{kind}/index", tmp_path / "moved")
        index.check_archives("train")
        assert index.archive_path(0) == tmp_path / f"moved/{kind}/images.tar"
    assert one.archives[0].path != two.archives[0].path


def test_archives_of_a_split_are_looked_for_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write(tmp_path)
    index.check_archives("train")
    os.remove(tmp_path / "images.tar")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"archive \(=.*images.tar\) is not there; name the folder that holds it with"):
            SampleIndex.load(index.path).check_archives(split)
    index = write(tmp_path, force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read anything
    with pytest.raises(ValueError, match=r"archive \(=.*images.tar\) cannot be read; give yourself read permission"):
        index.check_archives("train")


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index \(=.*none\) does not exist; make one with `alexnet index build`"):
        SampleIndex.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"index \(=.*empty\) has no index.json"):
        SampleIndex.load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"index \(=.*file\) is not a folder"):
        SampleIndex.load(save(tmp_path / "file", b""))
    save(tmp_path / "rubbish/index.json", b"\xff{")
    with pytest.raises(ValueError, match=r"index header \(=.*index.json\) is not JSON; build the index again"):
        SampleIndex.load(tmp_path / "rubbish")
    for text in (b"[]", b"{}", b"3", b'{"magic": 1}'):
        save(tmp_path / "rubbish/index.json", text)
        with pytest.raises(ValueError, match=r"index header \(=.*\) is not that of a sample index"):
            SampleIndex.load(tmp_path / "rubbish")
    save(tmp_path / "rubbish/index.json", b'{"magic": "alexnet-sample-index", "version": 1, "archives": 3}')
    with pytest.raises(ValueError, match="does not match its SHA-256"):
        SampleIndex.load(tmp_path / "rubbish")
    index = write(tmp_path)
    altered(index.path, {"version": 99})
    with pytest.raises(ValueError, match=r"index version \(=99\) of .* is not 1, the one this code reads; build"):
        SampleIndex.load(index.path)
    altered(index.path, {"version": 1, "samples": 5})
    with pytest.raises(ValueError, match=r"splits \(=train, val of 4 samples\) must be those of the 5 samples, each once"):
        SampleIndex.load(index.path)
    altered(index.path, {"samples": 4})
    SampleIndex.load(index.path)
    altered(index.path, {"preset": "other"}, resign=False)
    with pytest.raises(ValueError, match=r"index header \(=.*\) does not match its SHA-256, so it was altered; build it"):
        SampleIndex.load(index.path)


def test_damaged_arrays(tmp_path: Path) -> None:
    index = write(tmp_path)
    file = index.path / "samples.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"array \(=.*samples.npy\) of the index has \d+ bytes, was written with \d+; build the"):
        SampleIndex.load(index.path)
    file.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match=r"array \(=.*samples.npy\) of the index has SHA-256 .*, was written with .*; build the"):
        SampleIndex.load(index.path)
    altered(index.path, {"files": file_entry(file)})
    with pytest.raises(ValueError, match=r"samples \(=.*samples.npy\) cannot be read \(.*\); build the index again"):
        SampleIndex.load(index.path)
    file.unlink()
    with pytest.raises(ValueError, match=r"array \(=.*samples.npy\) of the index is missing; build the index again"):
        SampleIndex.load(index.path)
    np.save(file, np.array([{"an": "object"}]), allow_pickle=True)  # a pickle is never loaded
    altered(index.path, {"files": file_entry(file)})
    with pytest.raises(ValueError, match="cannot be read .*Python objects"):
        SampleIndex.load(index.path)


def test_a_large_index_is_hashed_again_when_it_was_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verified.json keeps inode, size and times of large arrays: any write changes them, also one that sets the times back."""
    index = write(tmp_path)
    file = index.path / "samples.npy"
    hashed: list[str] = []
    monkeypatch.setattr("pipeline.index.sample_index.difference",
                        lambda path, entry: hashed.append(path.name) or difference(path, entry))
    for _ in range(2):
        SampleIndex.load(index.path)
    assert len(hashed) == 2 and not (index.path / "verified.json").exists()  # a small one: always
    monkeypatch.setattr("pipeline.index.sample_index.ONCE_BYTES", 1)
    SampleIndex.load(index.path)
    assert not (index.path / "verified.json").exists()  # just written: a second write may leave the times as they are
    time.sleep(2.1)
    hashed.clear()
    for _ in range(3):
        SampleIndex.load(index.path)
    assert hashed == ["samples.npy"]
    (index.path / "verified.json").write_text("[")
    SampleIndex.load(index.path)
    assert len(hashed) == 2
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    with open(file, "r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="of the index has SHA-256"):
        SampleIndex.load(index.path)


@pytest.mark.parametrize(("field", "row", "value", "words"), [
    ("label", 1, 2, "label"), ("label", 0, -2, "label"), ("archive", 3, 1, "archive"), ("format", 0, 99, "format"),
    ("reason", 2, 200, "reason"), ("split", 3, 0, "split"), ("excluded", 0, 1, "split"),
    ("offset", 1, 1 << 63, "name or offset"), ("offset", 1, (1 << 64) - 1, "name or offset"), ("offset", 0, 0, "range of bytes"),
    ("size", 2, (1 << 32) - 1, "range of bytes"), ("header_blocks", 0, 9999, "range of bytes")])
def test_rows_point_at_what_is_there(tmp_path: Path, field: str, row: int, value: int, words: str) -> None:
    """Wrong values with right hashes."""
    index = write(tmp_path)
    rows = np.array(index.samples)
    rows[field][row] = value
    with pytest.raises(ValueError, match=rf"samples \(=.*samples.npy\) hold a {words} from row \d+ on that is not in the index"):
        with_rows(index, rows)


@pytest.mark.parametrize(("change", "words"), [
    ({"files": {}}, "header.files (without samples) must have it"), ({"classes": None}, "header.classes (=None) must be a list"),
    ({"samples": -5}, "header.samples (=-5) must be a number from 0 up"), ({"splits": [{"name": "train"}]}, "without first"),
    ({"archives": {}}, "header.archives (={}) must be a list"), ({"crc32": "no"}, "header.crc32 (='no') must be true or false"),
    ({"oddities": [{"id": 9, "name": "b", "split": "train", "reason": "", "kept": True}]}, "must be of a split and a sample"),
    ({"packed": {"square_px": "76"}}, "header.packed.square_px (='76') must be a whole number"),
    ({"derived": [3]}, "header.derived[0] (=3) must be an object"), ({"reasons": {"grey": 1.5}}, "must be a whole number")])
def test_headers_of_wrong_types_with_a_right_hash(tmp_path: Path, change: dict[str, object], words: str) -> None:
    index = write(tmp_path)
    altered(index.path, change)
    with pytest.raises(ValueError) as error:
        SampleIndex.load(index.path)
    assert words in str(error.value) and "is none that build_index.py writes: " in str(error.value)


@pytest.mark.parametrize("name", ["../precious.npy", "/precious.npy", "precious.npy", "stats.npz", "samples.npy/../x"])
def test_a_crafted_header_cannot_name_other_files(tmp_path: Path, name: str) -> None:
    """Neither is such a file read, nor do --force and --exclude remove it."""
    index = write(tmp_path)
    precious = [save(tmp_path / "precious.npy", b"mine"), save(index.path / "precious.npy", b"mine"),
                save(index.path / "stats.npz", b"")]
    altered(index.path, {"files": {"samples": {**index.header["files"]["samples"], "file": name}}})
    with pytest.raises(ValueError, match=r"files.samples.file \(=.*\) must be samples.npy or names.bin, bare"):
        SampleIndex.load(index.path)
    with pytest.raises(ValueError, match="must be samples.npy or names.bin, bare"):
        mark_excluded(index, {1: ("b", "does not decode")})
    write(tmp_path, force=True)
    assert all(path.exists() for path in precious)


def test_exclusions_of_two_processes_are_not_lost(tmp_path: Path) -> None:
    index = write(tmp_path)
    mark_excluded(index, {1: ("b", "does not decode")})
    with pytest.raises(RuntimeError, match="was changed by another process meanwhile, so nothing was excluded; run the same"):
        mark_excluded(index, {0: ("a", "does not decode")})
    assert SampleIndex.load(index.path).ids("train").tolist() == [0, 2]


def test_an_index_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds of one name at once: the first to finish has it, the other is told."""
    monkeypatch.setattr("pipeline.index.writer.check_output", lambda out, force: None)  # it looked before the other had finished
    first = write(tmp_path, preset="ilsvrc2012").sha256
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path)
    assert SampleIndex.load(tmp_path / "index").sha256 == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.tar", "index"]
    write(tmp_path, force=True)


def test_more_shards_than_files_that_may_be_open(tmp_path: Path) -> None:
    """Read by one process that may have 80 files open; and nothing stays open when the index is gone."""
    paths = [save(tmp_path / f"{i:03d}.tar", tar_bytes({"a.jpg": b"%03d" % i})) for i in range(200)]
    rows = np.zeros(len(paths), SAMPLE)
    rows["archive"], rows["offset"], rows["size"], rows["header_blocks"] = np.arange(len(paths)), 512, 3, 1
    write_index(tmp_path / "index", rows, classes=[ClassInfo("n1", "")], splits=["train"], preset="webdataset", crc32=False,
                archives=[Archive(path, path.stat().st_size, fingerprint(path), "tar") for path in paths])
    index, before = SampleIndex.load(tmp_path / "index"), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [index.read(id) for id in range(200)] == [b"%03d" % id for id in range(200)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del index
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_index_that_is_cut_while_in_use_stays_as_it_was(tmp_path: Path) -> None:
    """Mapped, the process would end by a signal."""
    (tmp_path / "images/c").mkdir(parents=True)
    (tmp_path / "images/c/a.JPEG").write_bytes(jpeg(1))
    index = built(tmp_path, "classes", tmp_path / "images")
    index.name(0)
    for name in ("samples.npy", "names.bin"):
        os.truncate(index.path / name, 0)
    assert index.samples["label"].tolist() == [0] and index.name(0) == "c/a.JPEG" and not index.samples.flags.writeable


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_an_index_works_in_a_forked_process(tmp_path: Path) -> None:
    """Also when a thread, which the child does not have, holds the lock of its archives meanwhile."""
    index = write(tmp_path)
    index.read(0)
    with index._lock_here():
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if index.read(1) == b"bbbb" and index.name(0) == "n1/a.JPEG" else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_output_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    index = write(tmp_path)
    with pytest.raises(ValueError, match=r"output folder \(=.*index\) holds an index already; give another name, or --force"):
        write(tmp_path)
    for force in (False, True):
        with pytest.raises(ValueError, match=r"output folder \(=.*\) exists and holds no index; give the name of a new"):
            check_output(tmp_path, force)
        check_output(tmp_path / "a/b", force)
        for place in (save(tmp_path / "file", b"") / "b", Path("/proc/none/b")):
            with pytest.raises(ValueError, match=rf"output folder \(={place}\) must be in a folder that can be written, but "
                                                 r".* cannot \(.*\); give another name"):
                check_output(place, force)
    (tmp_path / "file").unlink()
    save(index.path / "stats.npz", b"kept")
    again = write(tmp_path, force=True, crc32=True)
    assert again.header["crc32"] and (again.path / "stats.npz").read_bytes() == b"kept"
    assert len(os.listdir(again.path)) == 3 and sorted(os.listdir(tmp_path)) == ["images.tar", "index"]
    assert [index.name(id) for id in range(4)] == list(FILES)  # the map loaded before goes on


@pytest.mark.parametrize("fail_at", range(8))
@pytest.mark.parametrize("replace", [False, True])
def test_an_interrupted_write_leaves_the_old_index_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int,
                                                           replace: bool) -> None:
    old = write(tmp_path).sha256 if replace else ""
    calls = 0

    def fails(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fails)
    try:
        write(tmp_path, crc32=True, force=True)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    if (tmp_path / "index").exists():
        index = SampleIndex.load(tmp_path / "index")
        assert index.sha256 == old or index.header["crc32"]
        assert fail_at > 2 or index.sha256 == old
    else:
        assert not replace and fail_at <= 2


def test_rows_must_be_sorted_by_split(tmp_path: Path) -> None:
    rows = np.zeros(2, SAMPLE)
    rows["split"] = [1, 0]
    with pytest.raises(ValueError, match=r"samples \(=.*\) are not SAMPLE rows sorted by split; sort them"):
        write_index(tmp_path / "index", rows, classes=[], archives=[], splits=["train", "val"], preset="x", crc32=False)


def test_marking_excluded_keeps_ids_and_counts(tmp_path: Path) -> None:
    index = write(tmp_path)
    before = index.sha256
    assert mark_excluded(index, {1: ("b", "does not decode"), 3: ("d", "gone")}) != before
    after = SampleIndex.load(index.path)
    assert after.ids("train").tolist() == [0, 2] and after.ids("val").tolist() == [] and len(after) == 4
    assert after.header["reasons"] == {"damaged": 2}
    assert [split["excluded"] for split in after.header["splits"]] == [1, 1]
    assert [(entry["id"], entry["kept"], entry["reason"]) for entry in after.header["oddities"]] == [
        (1, False, "damaged: does not decode"), (3, False, "damaged: gone")]
    assert len(os.listdir(index.path)) == 2 and re.match(r"samples\.\w{16}\.npy", after.header["files"]["samples"]["file"])
    mark_excluded(after, {0: ("a", "x")})
    assert SampleIndex.load(index.path).ids("train").tolist() == [2] and len(os.listdir(index.path)) == 2
