"""Packing: the images, their order, the tars; killed and resumed, by several ranks, the bytes are the same."""
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pipeline.packing import pack
from pipeline.index.tar import open_tar, walk
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.header import content_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.index.writer import mark_excluded
from pipeline.packing.plan import PackOptions, order
from pipeline.packing.shard import decoded, key_of, psnr, squared_error
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.helpers.indexes import with_rows
from tests.helpers.loaders import eval_loader
from tests.helpers.small_set import encode, photographs, picture, write_set
from tools import build_index
from tools.pack_shards import main, topology

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "pack_shards.py")]
PX = 48
TRAIN, VAL = 40, 6
EXCLUDED, CORRUPT = 5, 17
OPTIONS = ["--square-px", str(PX), "--shard-images", "9", "--budget", "0.05"]
MACHINE = LoaderConfig(threads=1, quarantine_budget=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Photographs of all shapes, one of them excluded, one that cannot be decoded; statistics of the training images."""
    blobs = photographs(TRAIN)
    blobs[CORRUPT] = blobs[CORRUPT][:len(blobs[CORRUPT]) // 3]
    index = write_set(tmp_path_factory.mktemp("source"), blobs, [encode(picture(100 + i, 80, 60)) for i in range(VAL)])
    mark_excluded(index, {EXCLUDED: (index.name(EXCLUDED), "says the test")})
    index = SampleIndex.load(index.path)
    compute(index, "train", PX, machine=MACHINE).save(stats_path(index.path, PX))
    return index


@pytest.fixture(scope="module")
def packed(source: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """The uninterrupted run that the others are compared with."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert main([str(source.path), str(out), *OPTIONS, "--jobs", "1"]) == 0
    return SampleIndex.load(out)


def squares(index: SampleIndex, split: str, px: int = PX) -> dict[int, np.ndarray]:
    data = DataConfig("square", px, px, False, 0, "channel")
    with eval_loader("archives", index, split, data, 16, None, skip_corrupt=True, machine=MACHINE) as loader:
        return {id: pixels for batch in loader for id, pixels in zip(batch.ids.tolist(), batch.images.numpy().copy())}


def hashes(out: Path) -> dict[str, str]:
    """Every file of a packing but the header, which holds paths, by its SHA-256; of the header the hash without them."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())}
    found["index.json"] = content_sha256(json.loads((out / "index.json").read_bytes()))
    return found


def test_rows_are_the_originals(source: SampleIndex, packed: SampleIndex) -> None:
    assert len(packed) == len(source) and packed.split_names == source.split_names and packed.classes == source.classes
    for name in ("label", "split"):
        assert np.array_equal(packed.samples[name], source.samples[name])
    left_out = [EXCLUDED, CORRUPT]
    assert np.flatnonzero(packed.samples["excluded"]).tolist() == left_out
    kept = np.setdiff1d(np.arange(len(source)), left_out)
    assert (packed.samples["width"][kept] == PX).all() and (packed.samples["height"][kept] == PX).all()
    for id in range(len(source)):
        stem = Path(source.name(id)).stem
        assert packed.name(id) == f"{id:09d}-{stem}." + ("txt" if id in left_out else "jpg")
    assert "damaged" in packed.read(EXCLUDED).decode() and "cannot be decoded" in packed.read(CORRUPT).decode()
    odd = {entry["id"]: entry for entry in packed.header["oddities"]}
    assert "says the test" in odd[EXCLUDED]["reason"] and "cannot be decoded" in odd[CORRUPT]["reason"]
    assert packed.header["preset"] == "packed" and packed.packed is not None
    assert packed.packed["source"] == {split: source.split_sha256(split) for split in ("train", "val")}
    assert {key: packed.packed[key] for key in ("square_px", "region", "quality", "subsampling", "seed", "shard_images")} == {
        "square_px": PX, "region": "square", "quality": 90, "subsampling": "444", "seed": 0, "shard_images": 9}
    assert source.packed is None


def test_images_are_our_squares_encoded_once(source: SampleIndex, packed: SampleIndex) -> None:
    assert packed.packed is not None
    for split in ("train", "val"):
        there = squares(source, split)
        assert sorted(there) == packed.ids(split).tolist()
        values = []
        for id, pixels in there.items():
            jpeg = packed.read(id)
            assert jpeg == simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")
            values.append(psnr(squared_error(pixels, jpeg), PX * PX))
        assert min(values) > 30
        measured = packed.packed["measured"][split]
        assert measured["images"] == measured["measured"] == len(values)
        assert abs(measured["psnr_mean"] - np.mean(values)) < 0.01 and abs(measured["psnr_min"] - min(values)) < 0.01
        # The loaders read them as they were written; DALI's decoder and simplejpeg's are the same library.
        again = squares(packed, split)
        assert all(np.array_equal(again[id], simplejpeg.decode_jpeg(packed.read(id), "RGB")) for id in there)


def test_order_is_random_and_a_function_of_the_seed(source: SampleIndex, packed: SampleIndex) -> None:
    expected = order(source.ids("train"), 0)
    assert not np.array_equal(expected, np.sort(expected)) and not np.array_equal(expected, order(source.ids("train"), 1))
    assert np.array_equal(order(source.ids("train")[::-1], 0), expected)
    found = []
    for path in sorted(packed.path.glob("train-*.tar")):
        with open_tar(path) as tar:
            members = [member.name for member in walk(tar)]
        assert members[1::2] == [name.replace(".jpg", ".cls") for name in members[::2]]
        found += [int(name[:9]) for name in members[::2]]
        with tarfile.open(path) as plain:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in plain} == {(0, 0, 0, "", 0o644)}
    assert found == [id for id in expected.tolist() if id != CORRUPT]
    shards = [len(json.loads(file.read_bytes())["rows"]) for file in sorted(packed.path.glob("train-*.json"))]
    assert len(shards) == -(-(TRAIN - 1) // 9) and sum(shards) == TRAIN - 2 and max(shards) <= 9 and min(shards) >= 6


def test_webdataset_reads_the_shards(packed: SampleIndex) -> None:
    with warnings.catch_warnings():  # its own
        warnings.simplefilter("ignore")
        import webdataset

        shards = sorted(map(str, packed.path.glob("train-*.tar")))
        found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls"))
    assert sorted(int(key[:9]) for key, _, _ in found) == packed.ids("train").tolist()
    for key, pixels, label in found:
        id = int(key[:9])
        assert packed.name(id) == f"{key}.jpg" and label == packed.samples["label"][id]
        assert pixels.shape == (PX, PX, 3)


def test_the_verbs_of_the_index(packed: SampleIndex, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    for how in ([], ["--full", "--jobs", "1"], ["--scrub"]):
        assert build_index.main(["verify", str(packed.path), *how]) == 0
    assert build_index.main(["info", str(packed.path)]) == 0
    assert build_index.main(["ls", str(packed.path), "--odd"]) == 0
    assert f"{CORRUPT}  train".encode() in capsysbinary.readouterr().out
    assert build_index.main(["build", "webdataset", *map(str, sorted(packed.path.glob("*.tar"))), "--out",
                             str(packed.path.parent / "again"), "--jobs", "1"]) == 0
    assert len(SampleIndex.load(packed.path.parent / "again").ids("train")) == TRAIN - 2


def test_statistics_come_along(source: SampleIndex, packed: SampleIndex) -> None:
    assert Stats.for_index(packed, PX).sha256 == Stats.for_index(source, PX).sha256


def test_it_moves_with_its_shards(packed: SampleIndex, tmp_path: Path) -> None:
    """The copy is read, not the shards at the old place."""
    shutil.copytree(packed.path, tmp_path / "copy")
    copy = SampleIndex.load(tmp_path / "copy")
    assert copy.archive_path(0) == tmp_path / "copy" / "train-000000.tar"
    assert copy.read(0) == packed.read(0) and copy.name(EXCLUDED) == packed.name(EXCLUDED)


def test_killed_and_resumed(source: SampleIndex, packed: SampleIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(source.path), str(out), *OPTIONS]
    chance = random.Random(time.time_ns())
    killed = 0
    for wanted, jobs in zip(sorted(chance.sample(range(6), 3)), chance.sample(["1", "1", "2"], 3)):
        process = subprocess.Popen([*command, "--jobs", jobs], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        while process.poll() is None and len(list(out.glob("*.json"))) < wanted + 1:  # plan.json is one
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):  # its workers end a moment later
            while True:
                os.killpg(process.pid, 0)
                time.sleep(0.01)
    assert killed >= 2
    assert main([str(source.path), str(out), *OPTIONS, "--jobs", "1"]) == 0
    assert hashes(out) == hashes(packed.path)


def test_two_ranks_at_once(source: SampleIndex, packed: SampleIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    by_option = [*COMMAND, str(source.path), str(out), *OPTIONS, "--jobs", "1"]
    ranks = [subprocess.Popen([*by_option, "--rank", "0", "--world", "2"], stdout=subprocess.PIPE, text=True),
             subprocess.Popen(by_option, env={**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
                              stdout=subprocess.PIPE, text=True)]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert any("verified, SHA-256" in text for text in said)
    assert hashes(out) == hashes(packed.path)


def test_one_rank_leaves_the_others_share(source: SampleIndex, packed: SampleIndex, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(source.path), str(tmp_path / "out"), *OPTIONS, "--jobs", "1"]
    assert main([*command, "--rank", "1", "--world", "2"]) == 0
    assert "rank 1 of 2 has finished its share; 3 of 6 shards are not finished (train-000000.tar" in capsys.readouterr().out
    assert not (tmp_path / "out" / "index.json").exists()
    for _ in range(2):  # the second time it only verifies
        assert main([*command, "--rank", "0", "--world", "2"]) == 0
        assert "verified, SHA-256" in capsys.readouterr().out
    assert hashes(tmp_path / "out") == hashes(packed.path)


def test_a_shard_that_vanishes_is_no_other_ranks(source: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    write = pack.write

    def write_and_lose(*args: Any, **given: Any) -> int:
        written = write(*args, **given)
        (tmp_path / "out" / "train-000000.json").unlink()
        return written
    monkeypatch.setattr(pack, "write", write_and_lose)
    assert main([str(source.path), str(tmp_path / "out"), *OPTIONS, "--jobs", "1"]) == 2
    assert "train-000000.tar) was written and is not there any more; see who" in capsys.readouterr().err


def test_a_damaged_shard_is_found_and_written_again(source: SampleIndex, packed: SampleIndex, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(packed.path, tmp_path / "out")
    shard = tmp_path / "out" / "train-000002.tar"
    whole = shard.read_bytes()
    command = [str(source.path), str(tmp_path / "out"), *OPTIONS, "--jobs", "1"]
    shard.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    assert main(command) == 2
    assert f"shard (={shard}) differs from the SHA-256 of what was written; the same command writes it again" in (
        capsys.readouterr().err)
    assert main(command) == 0 and shard.read_bytes() == whole
    shard.write_bytes(whole[:-512])
    assert main(command) == 0 and shard.read_bytes() == whole
    shard.with_suffix(".json").write_text("{")
    assert main(command) == 0
    assert hashes(tmp_path / "out") == hashes(packed.path)


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_packed_folder_is_not_called_verified(source: SampleIndex, packed: SampleIndex, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """One bit anywhere in it: the second run fails, or writes the same bytes again. More of them: tests/slow/faults."""
    out = tmp_path / "out"
    shutil.copytree(packed.path, out)
    command = [str(source.path), str(out), *OPTIONS, "--jobs", "1"]
    before = hashes(out)
    chance = random.Random(12)
    for name in ("samples.npy", "index.json", "left-out.tar", "plan.json", "train-000001.json", f"stats-train-{PX}.npz",
                 "train-000000.tar"):
        path = out / name
        whole = path.read_bytes()
        for _ in range(2):
            flip(path, chance.randrange(len(whole)), chance.randrange(8))
            code = main(command)
            error = capsys.readouterr().err
            assert (code == 0 and hashes(out) == before) or (code == 2 and "error: " in error and "Traceback" not in error), name
            path.write_bytes(whole)
            shutil.copy2(packed.path / "train-000000.json", out)  # a damaged shard has lost its sidecar
            stats = stats_path(out, PX)
            stats.write_bytes(stats_path(packed.path, PX).read_bytes())
    assert main(command) == 0 and hashes(out) == before


def test_files_of_before_have_no_hash_of_their_own(source: SampleIndex, packed: SampleIndex, tmp_path: Path) -> None:
    """They are read nevertheless."""
    out = tmp_path / "out"
    shutil.copytree(packed.path, out)
    for path in (out / "plan.json", *out.glob("train-*.json"), *out.glob("val-*.json")):
        about = json.loads(path.read_bytes())
        del about["own_sha256"]
        path.write_text(json.dumps(about))
    assert main([str(source.path), str(out), *OPTIONS, "--jobs", "1"]) == 0


def test_a_shard_of_another_plan_stops_it(source: SampleIndex, packed: SampleIndex, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """An altered plan.json must not let all shards be written again."""
    out = tmp_path / "out"
    shutil.copytree(packed.path, out)
    about = json.loads((out / "plan.json").read_bytes())
    del about["own_sha256"]
    (out / "plan.json").write_text(json.dumps({**about, "encoder": about["encoder"], "shard_images": 8}))
    options = [word for word in OPTIONS if word not in ("--shard-images", "9")]
    assert main([str(source.path), str(out), *options, "--shard-images", "8", "--jobs", "1"]) == 2
    assert "was written for another plan.json than the one beside it, so one of them was altered; restore it, or" in (
        capsys.readouterr().err)


def test_an_interrupt_ends_at_once_and_goes_on(source: SampleIndex, packed: SampleIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*COMMAND, str(source.path), str(out), *OPTIONS, "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (out / "plan.json").exists():
        time.sleep(0.001)
    time.sleep(0.5)  # its processes are starting
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert main([*command[2:-1], "1"]) == 0
    assert hashes(out) == hashes(packed.path)


@pytest.mark.parametrize(("changed", "said"), [
    (["--quality", "85"], "--quality 90, not 85"), (["--seed", "1"], "--seed 0, not 1"),
    (["--subsampling", "420"], "--subsampling 444, not 420"), (["--square-px", "40"], "--square-px 48, not 40"),
    (["--region", "full"], "--region square, not full"), (["--shard-images", "8"], "--shard-images 9, not --shard-images 8"),
    (["--shard-images", "0"], "--shard-images 9, not --shard-mb 1000"), (["--split", "train"], "--split train val, not train"),
    (["--split", "val"], "--split (=val) must begin with train val"), (["--split", "test"], "split (=test) is not in the index"),
    (["--quality", "0"], "--quality (=0) must lie in 1…100"), (["--seed", "-1"], "--seed (=-1) must lie in"),
    (["--square-px", "0"], "--square-px (=0) must lie in 1…8192"), (["--jobs", "-1"], "--jobs (=-1) must be at least 0"),
    (["--shard-images", "-1"], "--shard-images (=-1) must be at least 0"), (["--shard-mb", "0"], "--shard-mb (=0) must be"),
    (["--budget", "2"], "--budget (=2) must be a share"), (["--rank", "2", "--world", "2"], "--rank (=2) must lie in 0…1"),
    (["--rank", "0"], "--rank (=0) and --world (=None) belong together")])
def test_other_options_are_refused(source: SampleIndex, packed: SampleIndex, changed: list[str], said: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    before = hashes(packed.path)
    assert main([str(source.path), str(packed.path), *OPTIONS, *changed]) == 2
    assert said in capsys.readouterr().err
    assert hashes(packed.path) == before


def test_other_folders_are_refused(source: SampleIndex, packed: SampleIndex, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(index: Path, out: Path, said: str) -> None:
        assert main([str(index), str(out), *OPTIONS]) == 2
        assert said in capsys.readouterr().err

    folder = tmp_path / "images"
    for name in ("cat/1.jpg", "cat/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(picture(1, 50, 50)))
    assert build_index.main(["build", "classes", str(folder), "--out", str(tmp_path / "index"), "--jobs", "1"]) == 0
    refused(tmp_path / "index", folder / "cat" / "out", f"must not lie in the folder of images {folder}")
    refused(source.path, source.path, "must not be the index itself")
    refused(source.path, folder, "exists and holds no packed shards")
    refused(packed.path, tmp_path / "out", f"INDEX (={packed.path}) is packed already")
    refused(tmp_path / "index", packed.path, "was made with --split train val, not train; images of train ")
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text("{}")
    refused(source.path, tmp_path / "plan", "must be one that pack_shards.py wrote")
    monkeypatch.setattr(pack, "SPARE", 1e12)
    refused(source.path, tmp_path / "out", "B free; make room, give another OUT, or a lower --quality")
    assert not (tmp_path / "out").exists()


def test_too_many_unreadable_images_stop_it(source: SampleIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source.path), str(tmp_path / "out"), *OPTIONS, "--budget", "0", "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert "unreadable samples of train (=1) must not exceed the budget (=0)" in said and source.name(CORRUPT) in said
    assert main([str(source.path), str(tmp_path / "out"), *OPTIONS, "--jobs", "1"]) == 0
    assert f"left out sample {CORRUPT} (={source.name(CORRUPT)})" in capsys.readouterr().out


def test_one_split_and_enlarged(source: SampleIndex, tmp_path: Path) -> None:
    command = [str(source.path), str(tmp_path / "out"), "--square-px", "112", "--split", "train", "--budget", "0.05"]
    assert main([*command, "--jobs", "1"]) == 0
    packed = SampleIndex.load(tmp_path / "out")
    assert packed.split_names == ["train"] and len(packed) == TRAIN
    there = squares(source, "train", 112)
    assert all(packed.read(id) == simplejpeg.encode_jpeg(there[id], 90, "RGB", "444") for id in (0, 5 + 1, 39))
    assert [path.name for path in sorted(packed.path.glob("*.tar"))] == ["left-out.tar", "train-000000.tar"]


def test_whole_images(source: SampleIndex, tmp_path: Path) -> None:
    """Their central squares are those of the square region, but for a rounding."""
    command = [str(source.path), str(tmp_path / "out"), *OPTIONS, "--region", "full", "--split", "train", "--jobs", "1"]
    assert main(command) == 0
    packed = SampleIndex.load(tmp_path / "out")
    rows = packed.samples[packed.ids("train")]
    assert np.minimum(rows["width"], rows["height"]).tolist() == [PX] * (TRAIN - 2) and rows["width"].max() > PX
    assert build_index.main(["verify", str(packed.path), "--full", "--jobs", "1"]) == 0
    skipped: dict[int, str] = {}
    there, differ, count = squares(source, "train"), 0, 0
    for id, pixels in decoded(source, "train", source.ids("train"), PackOptions("full", PX), 1, skipped):
        assert packed.read(id) == simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")
        top, left = (pixels.shape[0] - PX) // 2, (pixels.shape[1] - PX) // 2
        off = np.abs(pixels[top:top + PX, left:left + PX].astype(int) - there[id])
        assert off.max() <= 1
        differ, count = differ + int((off > 0).sum()), count + off.size
    assert differ < 1e-3 * count and list(skipped) == [CORRUPT]


def test_images_without_a_label_have_no_cls(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(4))
    samples = np.array(index.samples)
    samples["label"] = -1
    with_rows(index, samples)
    assert main([str(index.path), str(tmp_path / "out"), "--square-px", "32", "--jobs", "1"]) == 0
    with open_tar(tmp_path / "out" / "train-000000.tar") as tar:
        assert [Path(member.name).suffix for member in walk(tar)] == [".jpg"] * 4
    assert (SampleIndex.load(tmp_path / "out").samples["label"] == -1).all()


def test_keys_are_safe(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "c"
    folder.mkdir(parents=True)
    for name in ("a.b c.JPEG", "ü" * 60 + "x" * 60 + ".jpg"):
        (folder / name).write_bytes(encode(picture(1, 50, 50)))
    assert build_index.main(["build", "classes", str(folder.parent), "--out", str(tmp_path / "index"), "--jobs", "1"]) == 0
    assert main([str(tmp_path / "index"), str(tmp_path / "out"), "--square-px", "32", "--jobs", "1"]) == 0
    packed = SampleIndex.load(tmp_path / "out")
    assert {packed.name(id)[10:] for id in range(2)} == {"a_b_c.jpg", "_" * 60 + "x" * 20 + ".jpg"}


def test_a_name_that_cannot_be_read_now_is_no_other_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is a function of the index: an error of the disk stops it."""
    index = write_set(tmp_path, photographs(2))

    def read(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr("pipeline.index.sample_index.read_member", read)
    assert index.safe_name(0) == "?"
    with pytest.raises(OSError):
        key_of(index, 0)


def test_who_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert topology(None, None) == (0, 1, 1) and topology(1, 3) == (1, 3, 1)
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_TASKS_PER_NODE", "4(x2)")):
        monkeypatch.setenv(name, value)
    assert topology(None, None) == (5, 8, 4)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert topology(None, None) == (1, 2, 2) and topology(0, 1) == (0, 1, 1)


def test_psnr() -> None:
    assert psnr(3 * 100, 100) == pytest.approx(48.13, abs=0.01) and psnr(0, 100) == 100


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = ("import sys; sys.path.insert(0, '.'); from tools.pack_shards import parser; parser().format_help(); "
            "print({'torch', 'nvidia', 'numpy'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "set()"
