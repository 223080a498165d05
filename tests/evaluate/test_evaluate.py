"""Counting: ranks with ties, averaged softmax, every image once; chance; unlabelled and damaged input; many processes."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import TestLoader, views
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import processes
from train.evaluate.metrics import Score, ranks
from train.evaluate.predict import evaluate

PIXELS = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")


def loader(tiny_set: TinySet, batch: int = 7) -> TestLoader:
    index = SampleIndex.load(tiny_set.index)
    return TestLoader(index, "val", PIXELS, batch, Stats.for_index(index, 76), machine=LoaderConfig(threads=1))


class Means(nn.Module):
    """Logits (B, 6) from the mean of each half of each channel: sees where a crop lies and whether it is reflected."""

    def __init__(self) -> None:
        super().__init__()
        self.was_training: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 67, 67)
        self.was_training.add(self.training)
        return torch.cat([images[..., :20].mean((2, 3)), images[..., 40:].mean((2, 3))], 1) / 40


def test_ranks_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6], [1 / 3] * 3])
    assert ranks(probabilities, torch.tensor([0, 2, 0, 1, 2])).tolist() == [0, 2, 1, 2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ranks_refuse_what_is_not_finite(bad: float) -> None:
    with pytest.raises(RuntimeError, match=r"probabilities .* must be finite; the weights are damaged"):
        ranks(torch.tensor([[0.5, bad]]), torch.tensor([1]))


@pytest.mark.parametrize("count", [1, 10])
def test_counts_against_a_plain_loop(tiny_set: TinySet, count: int) -> None:
    network = Means().train()
    told: list[tuple[int, int]] = []
    with loader(tiny_set) as batches:
        score = evaluate(network, batches, count, contextlib.nullcontext, progress=lambda done, all: told.append((done, all)))
        assert score is not None and network.training and network.was_training == {False}
        top1 = top5 = images = 0
        loss = 0.0
        for batch in batches:
            for row in range(len(batch.ids)):
                square, label = batch.images[row:row + 1], int(batch.labels[row])
                crops = [network.eval()(view)[0].double().softmax(0) for view in views(square, 67, count)]
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
        with loader(tiny_set, batch) as batches:
            scores.append(evaluate(Means(), batches, 10, contextlib.nullcontext))
    assert scores[0] is not None and scores[1] is not None and scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
    assert replace(scores[0], loss=0) == replace(scores[1], loss=0)


def test_stopped_gives_no_score(tiny_set: TinySet) -> None:
    asked = iter([False, True])
    with loader(tiny_set) as batches:
        assert evaluate(Means(), batches, 1, contextlib.nullcontext, stop=lambda: next(asked)) is None


class Repeating(TestLoader):
    """Gives its first batch twice."""

    __test__ = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == 0:
                yield batch
            yield batch


class Unlabelled(TestLoader):
    """As a test split without ground truth."""

    __test__ = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield replace(batch, labels=batch.labels.clone().index_fill_(0, torch.tensor([2]), -1))


def test_an_image_twice_is_found(tiny_set: TinySet) -> None:
    index = SampleIndex.load(tiny_set.index)
    stats = Stats.for_index(index, 76)
    with Repeating(index, "val", PIXELS, 7, stats, machine=LoaderConfig(threads=1)) as batches:
        with pytest.raises(RuntimeError, match=r"images tested \(=31, 24 different\) must be the 24 of split val, each"):
            evaluate(Means(), batches, 1, contextlib.nullcontext)
    with Unlabelled(index, "val", PIXELS, 7, stats, machine=LoaderConfig(threads=1)) as batches:
        with pytest.raises(ValueError, match=r"split \(=val\) of .* has images without a label; choose a split with"):
            evaluate(Means(), batches, 1, contextlib.nullcontext)


def test_labels_in_another_order_are_at_chance() -> None:
    """A perfect network, and the same with the labels permuted as a wrong ILSVRC2012_ID map would."""
    labels = np.arange(50_000) % 1000
    permuted = np.random.default_rng(0).permutation(1000)[labels]
    assert not Score(50_000, 0, 0, 0.0, 1000).at_chance
    assert Score(50_000, int((labels != permuted).sum()), 0, 0.0, 1000).at_chance
    assert not Score(50_000, 49_800, 0, 0.0, 1000).at_chance  # 0.4% right, where chance is 0.1%


TOGETHER = """
import contextlib, sys, warnings
warnings.simplefilter("error")
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
from model.alexnet import AlexNet
from model.towers import BOTH, Tower
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.reading.source import SampleError
from pipeline.loading.eval_loader import TestLoader
from pipeline.stats import Stats
from tests.evaluate.test_evaluate import PIXELS, Means
from train.parallel.topology import process_group
from train.evaluate.predict import evaluate
from train.recipe import load

index = SampleIndex.load(sys.argv[1])
model = load(Path(sys.argv[2])).model
stats = Stats.for_index(index, 76)
torch.set_num_threads(1)

def tested(network, where=None, batch=5, spoil=lambda loader: None, **options):
    shard = (where.data_rank, where.data_ranks) if where else (0, 1)
    with TestLoader(index, "val", PIXELS, batch, stats, machine=LoaderConfig(threads=1), shard=shard) as loader:
        spoil(loader)
        return evaluate(network, loader, 10, contextlib.nullcontext, where=where, **options)

def raising(error):
    def spoil(loader):
        prepare = loader._prepare
        def failing(step):
            if step in (6, 7):
                raise error(index, 1000 + step, "is gone") if error is SampleError else error(f"no batch {step}")
            return prepare(step)
        loader._prepare = failing
    return spoil

with process_group(towers=2, device="cpu", timeout_s=60) as pairs:
    flat = replace(pairs, data_rank=pairs.global_rank, data_ranks=4, tower_rank=0, tower_ranks=1,
                   mesh=init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "tower")))
    whole = AlexNet(model, seed=3)
    alone = tested(whole)
    told = []
    assert alone == tested(whole, flat, progress=lambda done, total: told.append((done, total))), "not to the bit"
    assert told == [(20, 24), (24, 24)], told  # 5 batches: one process has two
    tower = Tower(pairs.tower_rank, 2, pairs.group("tower"))
    for scheme in "towers", "weird":  # batches of 5 are odd, for halves
        told.clear()
        score = tested(AlexNet(model, seed=3, tower=tower, scheme=scheme), pairs,
                       progress=lambda done, total: told.append((done, total)))
        assert replace(score, loss=0) == replace(alone, loss=0) and abs(score.loss - alone.loss) < 1e-6, scheme
        assert len(set(pairs.gather_objects(score))) == 1 and told == [(10, 24), (20, 24), (24, 24)], told
    # One process has stopped, cannot read, or fails, in the second round: so have, and do, all.
    asked = iter([False, flat.global_rank == 2, False])
    assert tested(Means(), flat, stop=lambda: next(asked)) is None
    for error, batch in (SampleError, 3), (OSError, 3):  # 8 batches: 6 and 7 are those of the third and the fourth process
        try:
            tested(Means(), flat, batch, raising(error))
        except Exception as caught:
            found = (type(caught).__name__, str(caught))
        every = flat.gather_objects(found)
        if error is SampleError:
            assert len(set(every)) == 1 and "sample 1006 (=" in found[1] and "is gone; run" in found[1], every
        else:
            other = ("RuntimeError", "process 2 could not test its images: no batch 6")
            assert every == [other, other, ("OSError", "no batch 6"), other], every
    print("done")
"""


def test_four_processes_share_the_batches_and_the_failures(tiny_set: TinySet, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER, encoding="utf-8")
    processes(4, script, tiny_set.index, write_recipe(tmp_path, tiny_set.index))
