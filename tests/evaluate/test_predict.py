"""Prediction: averaged softmax against a plain loop, every image once; unlabelled and damaged input; many processes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest
import torch

from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import EvalLoader
from pipeline.loading.eval_loader import crops as cut
from tests.conftest import TinySet
from tests.helpers.evaluations import Means, val_loader
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ROOT, processes
from train.evaluate.predict import evaluate, image_rows
from train.evaluate.predictions import SCALE


@pytest.mark.parametrize("count", [1, 10])
def test_counts_against_a_plain_loop(tiny_set: TinySet, count: int) -> None:
    network = Means().train()
    told: list[tuple[int, int]] = []
    with val_loader(tiny_set) as batches:
        score = evaluate(network, batches, count, contextlib.nullcontext, progress=lambda done, all: told.append((done, all)))
        assert score is not None and network.training and network.was_training == {False}
        top1 = top5 = images = 0
        loss = 0.0
        for batch in batches:
            for row in range(len(batch.ids)):
                square, label = batch.images[row:row + 1], int(batch.labels[row])
                crops = [network.eval()(view)[0].double().softmax(0) for view in cut(square, 67, count)]
                assert len(crops) == count
                mean = sum(crops) / count
                assert isinstance(mean, torch.Tensor)
                order = mean.argsort(descending=True, stable=True).tolist()
                top1, top5, images = top1 + (order[0] != label), top5 + (label not in order[:5]), images + 1
                loss -= float(mean[label].log())
    assert (score.images, score.top1_errors, score.top5_errors) == (images, top1, top5) and images == 24
    assert score.loss == pytest.approx(loss / images, rel=1e-9)
    assert 0 < top5 < top1 < images, "the test would not see a wrong count"
    assert told == [(7, 24), (14, 24), (21, 24), (24, 24)]
    assert score.top1 == top1 / 24 and score.top5 == top5 / 24 and score.as_dict()["top1_errors"] == top1


def test_batch_size_changes_nothing(tiny_set: TinySet) -> None:
    scores = []
    for batch in (1, 24):
        with val_loader(tiny_set, batch) as batches:
            scores.append(evaluate(Means(), batches, 10, contextlib.nullcontext))
    assert scores[0] is not None and scores[1] is not None and scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert replace(scores[0], loss=0) == replace(scores[1], loss=0)


def test_stopped_gives_no_score(tiny_set: TinySet) -> None:
    stops = iter([False, True])
    with val_loader(tiny_set) as batches:
        assert evaluate(Means(), batches, 1, contextlib.nullcontext, stop=lambda: next(stops)) is None


class Repeating(EvalLoader):
    """Gives its first batch twice."""

    __test__ = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == 0:
                yield batch
            yield batch


class Unlabelled(EvalLoader):
    """As a test split without ground truth."""

    __test__ = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield replace(batch, labels=batch.labels.clone().index_fill_(0, torch.tensor([2]), -1))


@pytest.mark.parametrize("kind, error, message", [
    (Repeating, RuntimeError, r"images tested \(=31, 24 different\) must be the 24 of split val, each"),
    (Unlabelled, ValueError, r"split \(=val\) of .* has images without a label; choose a split with")])
def test_images_that_cannot_be_counted(tiny_set: TinySet, kind: type[EvalLoader], error: type[Exception], message: str) -> None:
    with val_loader(tiny_set, kind=kind) as batches, pytest.raises(error, match=message):
        evaluate(Means(), batches, 1, contextlib.nullcontext)


def test_rows_of_a_batch_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.75 - 1e-12, 1e-12], [1.0, 0.0, 0.0]], dtype=torch.float64)
    rows, halves = image_rows(np.array([7, 8]), torch.tensor([2, -1]), probabilities)
    assert rows["id"].tolist() == [7, 8] and rows["place"].tolist() == [2, -1] and rows["probability"][0] == 1e-12
    assert np.isnan(rows["probability"][1]) and halves[1].tolist() == [32768.0, 0.0, 0.0]
    assert halves[0, 2] / SCALE == pytest.approx(1e-12, rel=0.5), "plain float16 has nothing below 6e-8"


def test_four_processes_share_the_batches_and_the_failures(tiny_set: TinySet, tmp_path: Path) -> None:
    processes(4, ROOT / "tests/helpers/predict_in_processes.py", tiny_set.index, write_recipe(tmp_path, tiny_set.index))
