import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.oracle import square
from tests.helpers.small_set import encode, photographs, picture, write_set
from PIL import Image

from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.helpers.tars import save
from tools import build_index, compute_stats, pack_shards


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("stats"), photographs(13), photographs(3))


def test_statistics_equal_the_oracle(photos: SampleIndex) -> None:
    found = compute(photos, "train", 76, batch=5)
    pixels = np.stack([square(photos.read(int(id)), 76) for id in photos.ids("train")]).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(pixels.reshape(-1, 3).T, bias=True))
    # decoders and filters differ by a grey level in places (see test_loader), so means by a fraction of one
    difference = np.abs(found.mean_image - pixels.mean(axis=0))
    assert difference.max() < 2 and difference.mean() < 0.2
    assert np.abs(found.channel_mean - pixels.mean(axis=(0, 1, 2))).max() < 0.1
    assert np.allclose(found.eigenvalues, values[::-1], rtol=0.01)
    assert np.allclose(np.abs((found.eigenvectors * vectors[:, ::-1]).sum(axis=0)), 1, atol=1e-3)
    assert (found.eigenvectors[np.abs(found.eigenvectors).argmax(axis=0), range(3)] > 0).all()
    assert found.count == 13 and found.skipped == {} and found.index == photos.split_sha256("train")


def test_the_sums_do_not_depend_on_batch_or_threads(photos: SampleIndex) -> None:
    hashes = {compute(photos, "train", 76, batch=batch, machine=LoaderConfig(threads=threads)).sha256
              for batch, threads in ((1, 1), (5, 2), (13, 1), (64, 2))}
    assert len(hashes) == 1


def test_unreadable_images_are_skipped_named_and_bounded(tmp_path: Path) -> None:
    blobs = photographs(12)
    healthy = write_set(tmp_path / "healthy", blobs[:4] + blobs[5:])
    blobs[4] = b"no picture" * 50
    index = write_set(tmp_path / "broken", blobs)
    found = compute(index, "train", 76, batch=5)
    assert list(found.skipped) == [4] and "cannot be decoded" in found.skipped[4] and found.count == 11
    assert found.sha256 == compute(healthy, "train", 76).sha256
    with pytest.raises(RuntimeError, match=r"unreadable samples \(=1 of 12\) must not exceed the budget \(=0\); the first: "
                                           r"train_0004.JPEG cannot be decoded"):
        compute(index, "train", 76, machine=LoaderConfig(quarantine_budget=0))


def test_saved_statistics_are_checked(photos: SampleIndex, tmp_path: Path) -> None:
    stats = compute(photos, "train", 76)
    path = tmp_path / "stats.npz"
    stats.save(path)
    again = Stats.load(path)
    assert again.sha256 == stats.sha256 and np.array_equal(again.mean_image, stats.mean_image)
    content = dict(np.load(path))
    content["channel_mean"] = content["channel_mean"] + 1
    np.savez(path, **content)
    with pytest.raises(ValueError, match=r"must have the recorded hash .*; it is damaged"):
        Stats.load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="must be one that tools/compute_stats.py wrote"):
        Stats.load(path)
    with pytest.raises(ValueError, match="must exist before training; run `alexnet stats"):
        Stats.for_index(photos, 99)
    Stats(**{**vars(stats), "index": "f" * 64}).save(stats_path(photos.path, 76))
    with pytest.raises(ValueError, match=r"\(of images ffffffffffff\) must belong to split train of the index as it is now"):
        Stats.for_index(photos, 76)


def test_a_single_colour_has_no_spread(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), (200, 100, 50)).save(buffer, "PNG")
    found = compute(write_set(tmp_path, [buffer.getvalue()] * 3), "train", 76)
    assert found.channel_mean.tolist() == [200, 100, 50] and np.allclose(found.eigenvalues, 0, atol=1e-6)
    assert json.dumps(found.eigenvalues.tolist())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_set(tmp_path, [encode(Image.new("RGB", (90, 80), (9, 9, 9)))] * 4)
    assert compute_stats.main([str(index.path), "--square-px", "76"]) == 0
    assert "4 images of train, 0 skipped" in capsys.readouterr().out
    assert Stats.for_index(index, 76).count == 4
    assert compute_stats.main([str(index.path), "--square-px", "76"]) == 0
    assert "is there and fits" in capsys.readouterr().out
    assert compute_stats.main([str(index.path), "--square-px", "0"]) == 2
    assert "--square-px (=0) must be at least 1" in capsys.readouterr().err
    assert compute_stats.main([str(tmp_path / "none"), "--square-px", "76"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert compute_stats.main([str(index.path), "--split", "test"]) == 2
    assert "split (=test) is not in the index" in capsys.readouterr().err


def test_a_file_that_is_away_is_not_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what was read can be corrupt: with a budget for all of it, nothing is computed from the rest."""
    for i in range(4):
        save(tmp_path / f"tree/cat/{i}.jpg", encode(picture(i, 90, 80)))
    assert build_index.main(["build", "classes", str(tmp_path / "tree"), "--out", str(tmp_path / "index")]) == 0
    (tmp_path / "tree/cat/2.jpg").unlink()
    capsys.readouterr()
    assert compute_stats.main([str(tmp_path / "index"), "--square-px", "76", "--budget", "1", "--threads", "1"]) == 2
    assert f"error: sample 2: file (={tmp_path / 'tree/cat/2.jpg'}) is not there; correct" in capsys.readouterr().err
    assert not list((tmp_path / "index").glob("stats*"))
    assert pack_shards.main([str(tmp_path / "index"), str(tmp_path / "out"), "--square-px", "76", "--budget", "1", "--jobs", "1",
                             "--shard-images", "9"]) == 2
    assert "2.jpg) is not there; correct" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_set(small_disk, photographs(6))
    fill = small_disk / "fill"
    fill.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    before = sorted(path.name for path in index.path.iterdir())
    assert compute_stats.main([str(index.path), "--square-px", "76", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert f"error: file (={stats_path(index.path, 76)}) cannot be written: the disk is full; make room there" in error
    assert "Traceback" not in error and sorted(path.name for path in index.path.iterdir()) == before
    fill.unlink()
    assert compute_stats.main([str(index.path), "--square-px", "76", "--threads", "1"]) == 0


def test_statistics_of_other_shapes_or_types(photos: SampleIndex, tmp_path: Path) -> None:
    stats, path = compute(photos, "train", 76), tmp_path / "stats.npz"
    stats.save(path)
    whole = dict(np.load(path))
    about = json.loads(whole["about"].tobytes())
    for change in ({"count": "13"}, {"skipped": []}, {"skipped": {"x": "y"}}, {"index": None}, {"sha256": 3}, {"count": -1}):
        np.savez(path, **{**whole, "about": np.frombuffer(json.dumps({**about, **change}).encode(), np.uint8)})
        with pytest.raises(ValueError, match="must be one that tools/compute_stats.py wrote; delete it"):
            Stats.load(path)
    for name, array in (("mean_image", np.float32(3)), ("eigenvalues", np.zeros(2)), ("channel_mean", np.zeros(3)),
                        ("more", np.zeros(1))):
        np.savez(path, **{**whole, name: array})
        with pytest.raises(ValueError, match="must hold the arrays that tools/compute_stats.py writes; delete it"):
            Stats.load(path)
    for name, value in (("mean_image", np.nan), ("eigenvalues", np.inf), ("eigenvalues", -1.0)):  # with a right hash
        forged = replace(stats, **{name: np.full_like(getattr(stats, name), value)})
        forged.save(path)
        with pytest.raises(ValueError, match="must hold finite numbers, and eigenvalues from 0 up; delete it"):
            Stats.load(path)
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises((PermissionError, ValueError)):  # root reads it
        Stats.load(path)
    with pytest.raises(IsADirectoryError):  # not damage
        Stats.load(tmp_path)
