"""Four processes test a network together (started by tests/evaluate/test_predict.py): index, recipe → "done" from each."""

import contextlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from model.alexnet import AlexNet
from model.towers import Tower
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import EvalLoader
from pipeline.reading.quarantine import SampleError
from pipeline.stats import Stats
from tests.helpers.evaluations import PIXELS, Means
from tests.helpers.loaders import eval_loader
from train.evaluate import predict as predicting
from train.evaluate.predict import evaluate, predict
from train.parallel.topology import Topology, process_group
from train.recipe import load

warnings.simplefilter("error")
index = SampleIndex.load(sys.argv[1])
model = load(Path(sys.argv[2])).model
stats = Stats.for_index(index, 76)
torch.set_num_threads(1)


class Unreadable(EvalLoader):
    """Cannot read an image of batches 6 and 7: those of the third and the fourth process in the second round."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step in (6, 7):
                raise SampleError(self.index, 1000 + batch.step, "is gone")
            yield batch


def loader(where: Topology = Topology.single(), batch: int = 5, kind: type[EvalLoader] = EvalLoader) -> EvalLoader:
    shard = where.data_rank, where.data_ranks
    made = eval_loader("archives", index, "val", PIXELS, batch, stats, machine=LoaderConfig(threads=1), shard=shard)
    made.__class__ = kind
    return made


def tested(network: torch.nn.Module, where: Topology = Topology.single(), batch: int = 5, kind: type[EvalLoader] = EvalLoader,
           **options: Any) -> Any:
    with loader(where, batch, kind) as batches:
        return evaluate(network, batches, 10, contextlib.nullcontext, topology=where, **options)


def predicted(network: torch.nn.Module, where: Topology = Topology.single()) -> list[np.ndarray]:
    parts: list[tuple[np.ndarray, ...]] = []
    with loader(where, 2) as batches:
        predict(network, batches, 10, contextlib.nullcontext, lambda *rows: parts.append(rows), topology=where)
    return [np.concatenate(part) for part in zip(*parts)]


with process_group(towers=2, device="cpu", timeout_s=60) as pairs:
    flat = replace(pairs, data_rank=pairs.global_rank, data_ranks=4, tower_rank=0, tower_ranks=1,
                   mesh=init_device_mesh("cpu", (4, 1), mesh_dim_names=("data", "tower")))
    whole = AlexNet(model, seed=3)
    alone = tested(whole)
    told: list[tuple[int, int]] = []
    assert alone == tested(whole, flat, progress=lambda done, total: told.append((done, total))), "not to the bit"
    assert told == [(20, 24), (24, 24)], told  # 5 batches: one process has two

    predicting._ROUNDS = 2  # 3 rounds: two exchanges
    for one, other in zip(predicted(whole), predicted(whole, flat)):
        assert one.tobytes() == other.tobytes(), "rows of all processes are those of one, in order"

    tower = Tower(pairs.tower_rank, 2, pairs.group("tower"))
    for scheme in "towers", "weird":  # batches of 5 are odd, for halves
        told.clear()
        score = tested(AlexNet(model, seed=3, tower=tower, scheme=scheme), pairs,
                       progress=lambda done, total: told.append((done, total)))
        assert replace(score, loss=0) == replace(alone, loss=0) and abs(score.loss - alone.loss) < 1e-6, scheme
        assert len(set(pairs.gather_objects(score))) == 1 and told == [(10, 24), (20, 24), (24, 24)], told

    # One process has stopped, or cannot read, in the second round: so have, and do, all.
    stops = iter([False, flat.global_rank == 2, False])
    assert tested(Means(), flat, stop=lambda: next(stops)) is None
    try:
        tested(Means(), flat, 3, Unreadable)
    except SampleError as error:
        every = flat.gather_objects(str(error))
        assert len(set(every)) == 1 and "sample 1006 (=" in every[0] and "is gone; run" in every[0], every
    print("done")
