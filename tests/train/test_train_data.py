"""What a run does about data that is not as it should be: said before the first step, or without losing an epoch."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.index.sample_index import SampleIndex
from pipeline.index.writer import mark_excluded
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import photographs, write_set
from tests.helpers.runs import here, same
from train import build
from train.checkpoint import checkpoint
from train.parallel.topology import Topology
from train.evaluate.__main__ import main as evaluate_main
from train.recipe import load

SHORT = ("--train.epochs=2", "--schedule.plateau=null")


def index_of(folder: Path, train: list[bytes], val: list[bytes]) -> SampleIndex:
    index = write_set(folder, train, val, classes=6)
    compute(index, "train", 76).save(stats_path(index.path, 76))
    return index


def test_an_undecodable_validation_image_does_not_cost_the_epoch(tmp_path: Path) -> None:
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:] + [b"this is no picture" * 40])
    bad = len(index) - 1
    recipe = write_recipe(tmp_path, index.path)
    _, err = here(recipe, tmp_path / "runs", *SHORT, code=4)
    assert f"error: sample {bad} (=val_0006.JPEG in {index.path}) cannot be decoded" in err and "--scrub --exclude" in err
    kept = checkpoint.checkpoints(tmp_path / "runs/small/checkpoints")
    assert [path.name for path in kept] == ["step-000000003"]
    mark_excluded(index, {bad: ("val_0006.JPEG", "cannot be decoded")})  # what the advice does; training images are as before
    out, _ = here(recipe, tmp_path / "runs", *SHORT, "--resume")
    assert "at step 3" in out
    here(recipe, tmp_path / "whole", *SHORT)
    same(tmp_path / "runs/small", tmp_path / "whole/small")


def test_a_changed_training_set_is_refused(tmp_path: Path) -> None:
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:])
    recipe = write_recipe(tmp_path, index.path)
    here(recipe, tmp_path, *SHORT, "--machine.stop_after=2", code=75)
    mark_excluded(index, {3: ("x", "gone")})
    _, err = here(recipe, tmp_path, *SHORT, "--resume", code=2)
    assert "training images (=" in err and "is not the one of this run" in err


def test_missing_labels_archives_and_images_are_said_before_a_run_folder_is_claimed(tmp_path: Path) -> None:
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:])
    recipe = write_recipe(tmp_path, index.path)
    tar = tmp_path / "set/images.tar"
    tar.rename(tmp_path / "away.tar")
    _, err = here(recipe, tmp_path / "runs", code=2)
    assert "images.tar" in err and err.startswith("error: ") and not (tmp_path / "runs").exists()
    (tmp_path / "away.tar").rename(tar)
    for id in index.ids("val"):
        mark_excluded(SampleIndex.load(index.path), {int(id): ("x", "gone")})
    _, err = here(recipe, tmp_path / "runs", code=2)
    assert f"split (=val) of {index.path} has no images; build the index with its labels" in err
    rows = np.array(SampleIndex.load(index.path).samples)
    assert not (tmp_path / "runs").exists() and rows["excluded"].sum() == 6


def test_unlabelled_validation_images_are_said_at_the_start(tmp_path: Path) -> None:
    """A val archive indexed without its devkit."""
    from tools import build_index

    folder = tmp_path / "set"
    folder.mkdir()
    blobs = photographs(30)
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(6):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as part:
                for image in range(4):
                    add(part, f"n{number:08d}_{image}.JPEG", blobs[number * 4 + image])
            add(tar, f"n{number:08d}.tar", inner.getvalue())
    with tarfile.open(folder / "val.tar", "w") as tar:
        for number in range(6):
            add(tar, f"ILSVRC2012_val_{number + 1:08d}.JPEG", blobs[24 + number])
    assert build_index.main(["build", "ilsvrc2012", "--train", str(folder / "train.tar"), "--val", str(folder / "val.tar"),
                             "--out", str(folder / "index")]) == 0
    index = SampleIndex.load(folder / "index")
    compute(index, "train", 76).save(stats_path(index.path, 76))
    _, err = here(write_recipe(tmp_path, index.path), tmp_path / "runs", code=2)
    assert f"split (=val) of {index.path} has 6 images without a label; build the index with its labels" in err


def add(tar: tarfile.TarFile, name: str, blob: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(blob)
    tar.addfile(member, io.BytesIO(blob))


def test_statistics_of_another_split_are_not_training_statistics(tmp_path: Path) -> None:
    blobs = photographs(12)
    index = index_of(tmp_path, blobs[:8], blobs[8:])
    before = Stats.for_index(index, 76)
    val = compute(index, "val", 76)
    val.save(stats_path(index.path, 76, "val"))
    assert Stats.for_index(index, 76).sha256 == before.sha256 != val.sha256
    val.save(stats_path(index.path, 76))
    with pytest.raises(ValueError, match="must belong to split train"):
        Stats.for_index(index, 76)


def test_best_and_last_are_asked_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:])
    here(write_recipe(tmp_path, index.path), tmp_path, "--machine.stop_after=2", code=75)
    assert evaluate_main(["--run", str(tmp_path / "small"), "--which", "best"]) == 2
    assert "has no validated checkpoint yet; wait for its first" in capsys.readouterr().err
    (only,) = checkpoint.checkpoints(tmp_path / "small/checkpoints")
    assert evaluate_main(["--checkpoint", str(only), "--which", "last"]) == 2
    assert "--which (=last) chooses among a run's checkpoints, and" in capsys.readouterr().err


def test_an_index_to_test_on_needs_only_the_split_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs = photographs(36)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:30])
    here(write_recipe(tmp_path, index.path), tmp_path, "--machine.stop_after=2", code=75)
    other = write_set(tmp_path / "other", [], blobs[30:], classes=6)
    assert len(other.ids("train")) == 0
    assert evaluate_main(["--run", str(tmp_path / "small"), "--index", str(other.path)]) == 0
    assert "split val: 6 images\n" in capsys.readouterr().out
    assert evaluate_main(["--run", str(tmp_path / "small"), "--index", str(other.path), "--split", "train"]) == 2
    assert f"split (=train) of {other.path} has no images; build" in capsys.readouterr().err


def test_both_processes_begin_with_the_same_quarantine(tmp_path: Path) -> None:
    """The list of the main process counts in the other too, which adds to one of its own."""
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:23] + [b"no picture" * 30], blobs[24:])
    listed = tmp_path / "quarantine.jsonl"
    listed.write_text(json.dumps({"id": 3}) + "\n", encoding="utf-8")
    config = load(write_recipe(tmp_path, index.path))
    stats = Stats.for_index(index, 76)
    for rank in (1, 0):
        where = Topology(rank, 2, 0, 1, rank, 2, torch.device("cpu"))
        with build.train_loader(config, where, index, stats, listed) as loader:
            with pytest.raises(RuntimeError, match=r"quarantine \(=2 unreadable samples\) must not exceed its budget \(=1\)"):
                for _ in range(9):  # epochs, until it is in this process's half of a batch
                    for batch in loader:
                        pass
    ids = [json.loads(line)["id"] for file in sorted(tmp_path.glob("quarantine*")) for line in file.read_text().splitlines()]
    assert ids == [23, 3]  # the second process, which met it first, and the main one


def test_a_stop_that_is_past_is_said(tmp_path: Path) -> None:
    blobs = photographs(30)
    index = index_of(tmp_path / "set", blobs[:24], blobs[24:])
    recipe = write_recipe(tmp_path, index.path)
    here(recipe, tmp_path, "--machine.stop_after=2", code=75)
    for stop in (1, 2):
        _, err = here(recipe, tmp_path, "--resume", f"--machine.stop_after={stop}", code=2)
        assert f"machine.stop_after (={stop}) must lie after step 2, where this run stands" in err
    here(recipe, tmp_path, "--resume", "--machine.stop_after=3", code=75)
