"""verify finds each damaged image, and only those; --exclude takes them out and nothing else."""
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.index import verify
from pipeline.index.sample_index import SampleIndex
from pipeline.decoding.scrub import scrub
from tests.helpers.small_set import encode, picture
from tests.helpers.tars import save, tar_bytes
from tools.build_index import main

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
    assert main(["verify", str(index.path)]) == 1
    assert "samples.npy differs from its SHA-256; build it again" in capsys.readouterr().out


def test_folder_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(6):
        save(tmp_path / f"tree/{'ab'[i % 2]}/{i}.jpg", encode(picture(i, 30, 30)))
    assert main(["build", "classes", str(tmp_path / "tree"), "--out", str(tmp_path / "index")]) == 0
    for how in ([], ["--full"], ["--scrub"]):
        assert main(["verify", str(tmp_path / "index"), *how]) == 0
    data = bytearray((tmp_path / "tree/b/3.jpg").read_bytes())
    data[400] ^= 1
    save(tmp_path / "tree/b/3.jpg", data)
    (tmp_path / "tree/a/2.jpg").unlink()
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "index"), "--full"]) == 1
    said = capsys.readouterr().out
    assert "damaged: sample 1 (=a/2.jpg) cannot be read: " in said and "damaged: sample 4 (=b/3.jpg) has CRC-32" in said
    assert f"damaged: {tmp_path / 'tree'} has " in said
    assert json.loads((tmp_path / "index/index.json").read_text())["reasons"] == {}


def test_a_folder_that_lost_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice of the error works, and what is counted is samples."""
    for number in range(6):
        save(tmp_path / f"tree/{'ab'[number % 2]}/{number}.jpg", encode(picture(number, 20, 30)))
    (tmp_path / "tree/fish").mkdir()
    assert main(["build", "classes", str(tmp_path / "tree"), "--out", str(tmp_path / "index")]) == 0
    index = SampleIndex.load(tmp_path / "index")
    assert [odd["reason"] for odd in index.header["oddities"]] == ["a folder without images"]
    index.file_path(2).unlink()
    capsys.readouterr()
    assert main(["verify", str(index.path), "--full"]) == 1
    assert "1 damaged of 6 samples, every CRC-32" in capsys.readouterr().out
    assert main(["verify", str(index.path), "--full", "--exclude"]) == 0
    assert "excluded 1 more samples" in capsys.readouterr().out
    assert list(SampleIndex.load(index.path).ids("train")) == [0, 1, 3, 4, 5]
    main(["verify", str(index.path), "--scrub"])
    assert "0 damaged of 5 samples, every image decoded; 1 excluded before, not checked" in capsys.readouterr().out
