"""verify finds each damaged image, and only those; --exclude takes them out and nothing else."""
import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.index import verify
from pipeline.index.sample_index import SampleIndex
from pipeline.decoding.scrub import scrub
from pipeline.stats import Stats
from tests.helpers.small_set import encode, picture
from tests.helpers.tars import save, tar_bytes
from tools.build_index import main
from tools.cli import ProgressBar

COUNT = 150  # more than two batches of the scrub


def build(folder: Path, change: dict[int, bytes] | None = None, *options: str) -> SampleIndex:
    """`folder`/c.tar with COUNT photographs in two classes, and its index. `change`: other bytes for some."""
    files = {f"{'cat' if i < 75 else 'dog'}/{i:03d}.JPEG": (change or {}).get(i) or encode(picture(i, 40 + i % 7, 60))
             for i in range(COUNT)}
    save(folder / "c.tar", tar_bytes(files))
    assert main(["build", "classes", str(folder / "c.tar"), "--out", str(folder / "index"), *options]) == 0
    return SampleIndex.load(folder / "index")


def flip(index: SampleIndex, id: int, at: int) -> None:
    """Change one byte of an image in its archive."""
    with open(index.archive_path(0), "r+b") as file:
        file.seek(int(index.samples["offset"][id]) + at)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))


def damaged(capsys: pytest.CaptureFixture[str]) -> list[int]:
    return [int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("damaged: sample")]


def test_undamaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path)
    for how, said in [([], "a quick look"), (["--full"], "every CRC-32"), (["--scrub"], "every image decoded"),
                      (["--full", "--jobs", "1"], "every CRC-32")]:
        assert main(["verify", str(index.path), *how]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"ok: 150 samples, {said}"


def test_full_finds_every_flip_and_exclude_takes_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 50_000)  # several tasks
    index = build(tmp_path)
    ids = [40, 41, 99, 120]  # not in the first or last 64 KiB, which the fingerprint covers
    for id in ids:
        flip(index, id, 700)
    capsys.readouterr()
    assert main(["verify", str(index.path), "--full"]) == 1
    assert damaged(capsys) == ids
    assert main(["verify", str(index.path), "--full", "--exclude", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "damaged: sample 99 (=dog/099.JPEG) has CRC-32" in said and "excluded 4 more samples" in said
    after = SampleIndex.load(index.path)
    assert sorted(set(range(COUNT)) - set(after.ids("train").tolist())) == ids
    assert after.header["reasons"] == {"damaged": 4} and after.sha256 != index.sha256
    assert main(["verify", str(index.path), "--full"]) == 0  # what is known is not reported again
    assert main(["verify", str(index.path), "--exclude"]) == 0


def test_full_needs_crcs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path, None, "--no-crc")
    assert main(["verify", str(index.path), "--full"]) == 2
    assert "holds no CRC-32 to check (built with --no-crc); build it again without --no-crc, or use --scrub" in \
        capsys.readouterr().err
    assert main(["verify", str(index.path)]) == 0


def test_damaged_tar_and_image_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path)
    flip(index, 60, -300)  # in the tar header
    frame = index.read(80).index(b"\xff\xc0")
    flip(index, 80, frame + 6)  # the height
    for how in ([], ["--full"]):
        assert main(["verify", str(index.path), *how]) == 1
        said = capsys.readouterr().out
        assert "damaged: sample 60 (=?) its tar header is damaged: header (of" in said
        assert "damaged: sample 80 (=dog/080.JPEG)" in said and said.count("damaged: ") == 3
    assert "2 damaged of 150 samples" in said
    assert main(["verify", str(index.path), "--full", "--exclude"]) == 0
    assert 60 not in SampleIndex.load(index.path).ids("train")


def test_scrub_finds_what_does_not_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images damaged before they were indexed, so that their CRC-32 is right: cut, or with other sizes inside."""
    whole = {i: encode(picture(i, 200, 200)) for i in (5, 70, 71, 149)}
    odd = {i: data[:len(data) // 2] for i, data in whole.items()}
    odd[149] = whole[149][:-40]  # a region decode of the upper part never sees this
    index = build(tmp_path, odd)
    capsys.readouterr()
    assert main(["verify", str(index.path), "--full"]) == 0
    capsys.readouterr()
    assert main(["verify", str(index.path), "--scrub"]) == 1
    found = capsys.readouterr().out
    for id in odd:
        assert f"damaged: sample {id} (=" in found
    assert found.count("cannot be decoded") == 4 and "4 damaged of 150 samples, every image decoded" in found
    assert main(["verify", str(index.path), "--scrub", "--exclude"]) == 0
    after = SampleIndex.load(index.path)
    assert sorted(set(range(COUNT)) - set(after.ids("train").tolist())) == sorted(odd)
    assert all(entry["reason"].startswith("damaged: cannot be decoded") for entry in after.header["oddities"])
    assert scrub(after, 2) == []


def test_archive_replaced_cut_or_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path)
    path = tmp_path / "c.tar"
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\1" + data[101:])
    assert main(["verify", str(index.path)]) == 1
    assert f"damaged: {path} has another fingerprint than when it was indexed" in capsys.readouterr().out
    cut = int(index.samples["offset"][140]) + 10
    path.write_bytes(data[:cut])
    assert main(["verify", str(index.path), "--full", "--exclude"]) == 2
    said, error = capsys.readouterr()
    assert f"damaged: {path} has {cut} bytes, had {len(data)} when it was indexed" in said
    assert "when it was indexed, so nothing was excluded; restore it first, or build the index again" in error
    assert len(SampleIndex.load(index.path).ids("train")) == COUNT
    assert sum("damaged: sample" in line for line in said.splitlines()) == 10
    path.unlink()
    assert main(["verify", str(index.path)]) == 2
    assert f"archive (={path}) is not there; name the folder that holds it with --archives" in capsys.readouterr().err
    save(tmp_path / "moved/c.tar", data)
    assert main(["verify", str(index.path), "--archives", str(tmp_path / "moved")]) == 0


def test_altered_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = build(tmp_path)
    rows = np.array(index.samples)
    rows["label"][3] = 1
    np.save(index.path / "samples.npy", rows)
    for command in (["verify", str(index.path)], ["info", str(index.path)], ["cat", str(index.path), "0"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "samples.npy) of the index has SHA-256" in error and error.endswith("; build the index again\n")
    with pytest.raises(ValueError, match="of the index has SHA-256 .*; build the index again"):  # not: compute the statistics
        Stats.for_index(SampleIndex.load(index.path), 76)


def test_folder_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        save(tmp_path / f"tree/{'ab'[i % 2]}/{i}.jpg", encode(picture(i, 30, 30)))
    assert main(["build", "classes", str(tmp_path / "tree"), "--out", str(tmp_path / "index")]) == 0
    for how in ([], ["--full"], ["--scrub"]):
        assert main(["verify", str(tmp_path / "index"), *how]) == 0
    data = bytearray((tmp_path / "tree/b/3.jpg").read_bytes())
    data[400] ^= 1
    save(tmp_path / "tree/b/3.jpg", data)
    save(tmp_path / "tree/a/2.jpg", b"short")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "index"), "--full"]) == 1
    said = capsys.readouterr().out
    assert "2.jpg) of sample 1 has 5 bytes, the index says " in said and "damaged: sample 4 (=b/3.jpg) has CRC-32" in said
    assert f"damaged: {tmp_path / 'tree'} has " in said
    assert json.loads((tmp_path / "index/index.json").read_text())["reasons"] == {}
    assert main(["verify", str(tmp_path / "index"), "--full", "--exclude"]) == 0
    assert "excluded 2 more samples" in capsys.readouterr().out
    assert list(SampleIndex.load(tmp_path / "index").ids("train")) == [0, 2, 3, 5]


def disturbed(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[], None]) -> None:
    """Let the first step of a check disturb what is being checked."""
    class Disturbed(ProgressBar):
        def advance(self, images: int, bytes: int) -> None:
            if not done:
                done.append(True)
                disturb()

    done: list[bool] = []
    monkeypatch.setattr("tools.build_index.ProgressBar", Disturbed)


def folder_of(tmp_path: Path, count: int) -> SampleIndex:
    for number in range(count):
        save(tmp_path / f"away/tree/{'ab'[number % 2]}/{number:03d}.jpg", encode(picture(number, 20, 30)))
    assert main(["build", "classes", str(tmp_path / "away/tree"), "--out", str(tmp_path / "index")]) == 0
    return SampleIndex.load(tmp_path / "index")


@pytest.mark.parametrize("how", ["--full", "--scrub"])
@pytest.mark.parametrize("fault", ["away", "file gone", "EMFILE", "EIO", "ESTALE", "EACCES"])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str], how: str, fault: str) -> None:
    """In the midst of a check with --exclude: it ends with one line, and excludes nothing."""
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 20_000)  # several tasks
    index = folder_of(tmp_path, COUNT)
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)

    def disturb() -> None:
        if fault == "away":
            os.rename(tmp_path / "away", tmp_path / "back")
        elif fault == "file gone":
            os.remove(index.file_path(COUNT - 1))
        elif fault == "EMFILE":
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, open_files[1]))
        else:  # which no file system gives on demand
            read = Path.read_bytes

            def fails(path: Path) -> bytes:
                if path.suffix == ".jpg":
                    raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)), str(path))
                return read(path)

            monkeypatch.setattr(Path, "read_bytes", fails)

    disturbed(monkeypatch, disturb)
    capsys.readouterr()
    try:
        code = main(["verify", str(index.path), how, "--exclude", "--jobs", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, open_files)
    said = capsys.readouterr()
    assert code == 2 and "damaged" not in said.out
    assert said.err.count("error: ") == 1 and said.err.splitlines()[-1].startswith("error: ")
    words = {"away": "is not there", "file gone": "is not there; correct the name, restore it", "EMFILE": "ulimit -n",
             "EIO": "its disk reports an error (EIO)", "ESTALE": "(ESTALE)", "EACCES": "may not be read or written by this user"}
    assert words[fault] in said.err
    after = SampleIndex.load(index.path)
    assert after.sha256 == index.sha256 and len(after.ids("train")) == COUNT


def test_an_archive_that_changes_during_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Cut while it is read: its samples are not excluded."""
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 20_000)
    for how in ("--full", "--scrub"):
        index = build(tmp_path / how)
        path = index.archive_path(0)
        disturbed(monkeypatch, partial(os.truncate, path, 100_000))
        capsys.readouterr()
        assert main(["verify", str(index.path), how, "--exclude", "--jobs", "1"]) == 2
        error = capsys.readouterr().err
        assert "when it was indexed, so nothing was excluded" in error or "was cut while it was read" in error
        assert SampleIndex.load(index.path).sha256 == index.sha256


def test_a_folder_that_lost_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not there is not damaged: it is named, and not excluded."""
    index = folder_of(tmp_path, 6)
    path = index.file_path(2)
    path.rename(tmp_path / "kept")
    capsys.readouterr()
    for how in (["--full"], ["--full", "--exclude"], ["--scrub", "--exclude"]):
        assert main(["verify", str(index.path), *how, "--jobs", "1"]) == 2
        assert capsys.readouterr().err.endswith(f"error: file (={path}) is not there; correct the name, restore it, or mount the "
                                                "disk it lies on\n")
    (tmp_path / "kept").rename(path)
    assert main(["verify", str(index.path), "--full", "--exclude"]) == 0
    assert len(SampleIndex.load(index.path).ids("train")) == 6


def test_what_libjpeg_warns_of_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DALI decodes these: a height larger than the data, bytes behind the data, a scan that ends early; indexed so, with their
    CRC-32. A CMYK, a grey, a progressive one and one with sizes that TurboJPEG cannot name are healthy."""
    whole = encode(picture(1, 60, 80))
    taller = bytearray(whole)
    taller[whole.index(b"\xff\xc0") + 6] += 40
    odd = {3: bytes(taller), 70: whole[:-2] + b"rubbish" * 8 + whole[-2:], 71: whole[:-300] + whole[-2:]}
    healthy = {8: encode(picture(2, 60, 80).convert("CMYK")), 9: encode(picture(3, 60, 80).convert("L")),
               10: encode(picture(4, 60, 80), quality=80, progressive=True),
               11: encode(picture(5, 60, 80).convert("CMYK"), quality=80, subsampling=0)}
    index = build(tmp_path, odd | healthy)
    capsys.readouterr()
    assert main(["verify", str(index.path), "--scrub"]) == 1
    found = capsys.readouterr().out
    assert sorted(int(line.split()[2]) for line in found.splitlines() if line.startswith("damaged: sample")) == sorted(odd)
    assert "premature end of data segment" in found and "extraneous bytes before marker 0xd9" in found


def test_scrub_compares_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice of training after a CRC error leaves that image out, though it decodes."""
    index = build(tmp_path)
    flip(index, 99, 700)
    capsys.readouterr()
    assert main(["verify", str(index.path), "--scrub", "--exclude"]) == 0
    assert "damaged: sample 99 (=dog/099.JPEG) has CRC-32" in capsys.readouterr().out
    assert 99 not in SampleIndex.load(index.path).ids("train")


def test_whoever_reads_the_output_may_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is the same, and what was asked for is done."""
    index = build(tmp_path)
    flip(index, 40, 300)
    for options, code in (([], 1), (["--exclude"], 0), ([], 0)):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as pipe, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", pipe)
            assert main(["verify", str(index.path), "--full", *options]) == code
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    assert SampleIndex.load(index.path).samples["excluded"].sum() == 1
