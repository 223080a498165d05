"""Files of predictions: order, IDs, splits without labels, excluded and missing images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.index.sample_index import SampleIndex
from pipeline.index.writer import mark_excluded
from pipeline.index.builder import Builder
from pipeline.index.ilsvrc import read_devkit
from pipeline.index.ilsvrc import build_ilsvrc
from tests.conftest import TinySet
from tests.helpers.evaluations import evaluate, evaluate_json
from tests.helpers.trained_run import write_run
from tools.demo import dataset as make_demo
from train.evaluate import predictions as saved, submission


@pytest.fixture(scope="module")
def runs(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        write_run(folder, tiny_set, name=name, seed=seed)
    return folder


@pytest.fixture
def unlabelled(tiny_set: TinySet, tmp_path: Path) -> SampleIndex:
    """The validation images as a test split, whose labels nobody has."""
    build_ilsvrc(Builder(tmp_path / "index", "ilsvrc2012", jobs=1), train=None, val=None, test=tiny_set.folder / make_demo.VAL,
                 devkit=tiny_set.folder / make_demo.DEVKIT)
    return SampleIndex.load(tmp_path / "index")


def test_ids_are_those_of_the_devkit(tiny_set: TinySet) -> None:
    """The ground truth, which holds IDs in the order of the names, is what a perfect network would submit."""
    index, devkit = SampleIndex.load(tiny_set.index), tiny_set.folder / make_demo.DEVKIT
    ids = submission.challenge_ids(index, devkit)
    assert sorted(ids) == [1, 2, 3, 4, 5, 6] and list(ids) != sorted(ids), "the test would not see another order"
    kit = read_devkit(devkit)
    assert [kit.label_of_id[number] for number in ids] == list(range(6))


def test_lines_are_in_order_and_best_first(tiny_set: TinySet, tmp_path: Path) -> None:
    index = SampleIndex.load(tiny_set.index)
    ids, images = np.array([4, 2, 6, 1, 3, 5]), index.ids("val")
    best = np.stack([(np.arange(24) + k) % 6 for k in range(5)], 1)
    told: list[str] = []
    submission.write(tmp_path / "file.txt", index, "val", images, best, ids, told.append)
    lines = (tmp_path / "file.txt").read_text().splitlines()
    assert lines[:3] == ["4 2 6 1 3", "2 6 1 3 5", "6 1 3 5 4"] and len(lines) == 24 and told == []
    submission.write(tmp_path / "file.txt", index, "val", np.delete(images, 1), np.delete(best, 1, 0), ids, told.append)
    assert (tmp_path / "file.txt").read_text().splitlines() == [lines[0], "1 2 3 4 5", *lines[2:]]
    assert told == [f"1 images of split val are excluded from {index.path}; their lines of {tmp_path / 'file.txt'} are guesses"]
    with pytest.raises(ValueError, match=r"submission \(=.*\) cannot be written: .* is not there; .*or give another"):
        submission.write(tmp_path / "no/file.txt", index, "val", images, best, ids, told.append)


def test_a_split_without_labels(tiny_set: TinySet, runs: Path, unlabelled: SampleIndex, tmp_path: Path) -> None:
    more = ("--index", unlabelled.path, "--split", "test", "--views", 1)
    assert "has 24 images without a label" in evaluate("--run", runs / "a", *more, code=2)[1]
    kit = ("--devkit", tiny_set.folder / make_demo.DEVKIT)
    _, err = evaluate("--run", runs / "a", "--submission", tmp_path / "no/file.txt", *kit, code=2)
    assert "cannot be written, its folder does not exist; give another --submission" in err
    _, err = evaluate("--run", runs / "a", "--submission", tmp_path / "file.txt", "--devkit", tmp_path / "no.tar.gz", code=2)
    assert "no.tar.gz) does not exist; give the ILSVRC devkit" in err and not (runs / "a/evaluations").exists()
    out, err = evaluate("--run", runs / "a", runs / "b", *more, "--submission", tmp_path / "test.txt", *kit)
    assert "no labels, so no errors were counted" in out and "err@" not in out and err == ""
    assert out.endswith(f"predictions in {tmp_path / 'test.txt'}\n")
    evaluate("--run", runs / "a", runs / "b", "--views", 1, "--submission", tmp_path / "val.txt", *kit)
    assert (tmp_path / "test.txt").read_bytes() == (tmp_path / "val.txt").read_bytes(), "the same images, in the same order"
    found = evaluate_json("--run", runs / "a", runs / "b", "--views", 1)
    labelled = SampleIndex.load(tiny_set.index)
    truth = labelled.samples["label"][labelled.ids("val")]
    ids = submission.challenge_ids(unlabelled, kit[1])
    lines = [list(map(int, line.split())) for line in (tmp_path / "test.txt").read_text().splitlines()]
    assert [len(set(line)) for line in lines] == [5] * 24
    assert sum(line[0] != ids[label] for line, label in zip(lines, truth)) == found["ensemble"]["top1_errors"]
    assert sum(ids[label] not in line for line, label in zip(lines, truth)) == found["ensemble"]["top5_errors"]
    folders = sorted((runs / "a/evaluations").glob("*-test-1view"))
    assert len(folders) == 1 and not saved.load(folders[0]).labelled
    assert "so there is nothing to count; write predictions with" in evaluate("--checkpoint", *folders, code=2)[1]


def test_lines_that_would_belong_to_other_images(tiny_set: TinySet, unlabelled: SampleIndex, tmp_path: Path) -> None:
    told: list[str] = []
    submission.check_numbering(unlabelled, "test", told.append)
    mark_excluded(unlabelled, {3: ("x", "damaged")})
    submission.check_numbering(SampleIndex.load(unlabelled.path), "test", told.append)
    assert told == []
    with pytest.raises(ValueError, match=r"image \(=.*\) must have number 1 in its name, as the challenge's images have"):
        submission.check_numbering(SampleIndex.load(tiny_set.index), "train", told.append)
    other = tmp_path / "devkit"
    make_demo.make(other, 7, 6, 4, 1, (80, 90))
    with pytest.raises(ValueError, match=r"devkit \(=.*\) has no ID for [1-6] of the 6 classes of .*, such as n\d+; give the"):
        submission.challenge_ids(unlabelled, other / make_demo.DEVKIT)
