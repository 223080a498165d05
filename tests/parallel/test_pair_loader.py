"""Halves made by two processes and swapped are the batch that one makes alone: every tier, substitution and resume included."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline import tiers
from pipeline.loading.batch import Batch
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import Quarantine
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.helpers.digests import digest
from tests.helpers.loaders import train_loader
from tests.helpers.packed_set import write_packed
from tests.helpers.small_set import encode, photographs, picture, write_set
from train.config import ParallelConfig
from train.parallel import pair_loader as module
from train.parallel.topology import Topology
from train.parallel.pair_loader import PairLoader, loader_shard, pair_loader

DATA = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
COUNT, BATCH, STEPS = 46, 8, 14  # epochs end after 6, 12 and 18 steps
WAYS = [("archives", "ram", "split"), ("archives", "ram", "replicate"), ("packed", "ram", "split"), ("streamed", "ram", "split"),
        ("resident", "ram", "split"), ("resident", "gpu", "split"), ("resident", "gpu", "replicate")]
SPLIT, REPLICATE, WEIRD = ParallelConfig(), ParallelConfig(feed="replicate"), ParallelConfig(scheme="weird")


def place(rank: int, towers: int = 2) -> Topology:
    """Process `rank` of four, on one machine."""
    return Topology(rank // towers, 4 // towers, rank % towers, towers, rank, 4, torch.device("cpu"))


def make(folder: Path, tier: str, memory: str, shard: tuple[int, int], **options: Any) -> TrainLoader:
    """The loader of a tier over the set in `folder`: originals, or packed images for the tiers that read them."""
    index = SampleIndex.load(folder / ("packed" if tier in ("packed", "streamed") else "photos") / "index")
    machine = LoaderConfig(threads=1, resident_folder=str(folder / "resident"), resident_memory=memory)
    return train_loader(tier, index, "train", DATA, BATCH, 7, Stats.for_index(index, 76), machine=machine, shard=shard,
                        window=14, lanes=4, quarantine=Quarantine(2), **options)


def take(loader: TrainLoader | PairLoader, steps: int) -> list[Batch]:
    """So many batches, across epochs."""
    found: list[Batch] = []
    while len(found) < steps:
        found.extend(itertools.islice(loader, steps - len(found)))
    return found


class Failing(TrainLoader):
    """Whose third batch cannot be made."""

    def __next__(self) -> Batch:
        if self.step == 2:
            raise RuntimeError("the disk is gone")
        return super().__next__()


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    try:
        torch.save(found(rank, folder), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def found(rank: int, folder: Path) -> dict[Any, Any]:
    """What this process is fed, by tier and feed, and what became of the loaders."""
    where = place(rank)
    kept: dict[Any, Any] = {}
    for tier, memory, way in WAYS:
        parallel = {"split": SPLIT, "replicate": REPLICATE}[way]
        group = dist.new_group() if memory == "gpu" else None
        loader = make(folder, tier, memory, loader_shard(parallel, where, BATCH), group=group)
        with contextlib.closing(pair_loader(loader, parallel, where)) as batches:
            first = take(batches, 4)
            batches.close()  # a swap, or an exchange of squares, is under way
            assert (batches.step, batches.epoch, len(batches)) == (4, 0, 6)
            kept[tier, memory, way] = digest(first + take(batches, STEPS - 4)), batches.state_dict()
    weird = make(folder, "archives", "ram", loader_shard(WEIRD, where, BATCH))
    with contextlib.closing(pair_loader(weird, WEIRD, where)) as batches:
        kept["weird"] = take(batches, 7)

    loader = make(folder, "archives", "ram", loader_shard(SPLIT, where, BATCH))
    with contextlib.closing(pair_loader(loader, SPLIT, where)) as batches:
        assert isinstance(batches, PairLoader) and batches.threads == 1 and batches.note == ""
        assert [(batch.step, batches.step, batches.epoch) for batch in batches] == [(n, n + 1, n // 5) for n in range(6)]
        batches.load_state_dict({**batches.state_dict(), "step": 9})
        kept["resumed"] = digest(take(batches, STEPS - 9))
        waits, spans = batches.monitor.waits, batches.monitor.spans
        assert waits.batches == spans["wait"] == spans["swap"] + 1 and waits.copy > 0  # one is on its way
        if rank == 3:
            loader.__class__ = Failing  # its partner is left with a swap nobody answers
        batches.load_state_dict({**batches.state_dict(), "step": 0})
        assert len(take(batches, 2)) == 2
        if rank == 3:
            with pytest.raises(RuntimeError, match="the disk is gone"):
                next(batches)
            assert batches.step == 2
        module._CLOSE_S, start = 0.3, time.monotonic()
    assert time.monotonic() - start < 30, "closing does not wait for the lost partner"
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 photographs, and the same number packed; of either one is not what was indexed."""
    made = tmp_path_factory.mktemp("feed")
    squares = [encode(picture(i, 76, 76)) for i in range(COUNT)]
    for index in (write_set(made / "photos", photographs(COUNT)), write_packed(made / "packed", squares, 9)):
        compute(index, "train", 76).save(stats_path(index.path, 76))
        row = index.samples[13]
        with open(index.archive_path(int(row["archive"])), "r+b") as file:
            file.seek(int(row["offset"]) + int(row["size"]) // 2)
            file.write(b"torn")
    return made


def test_two_pairs_are_fed_what_two_processes_make(folder: Path) -> None:
    torch.multiprocessing.spawn(process, (folder,), nprocs=4)
    kept = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]
    for tier in tiers.TIERS:
        for data_rank in range(2):
            with make(folder, tier, "ram", (data_rank, 2)) as alone:
                batches = take(alone, STEPS)
                expected = digest(batches), alone.state_dict()
            for tower_rank in range(2):
                mine = kept[2 * data_rank + tower_rank]
                assert [way for way in WAYS if way[0] == tier and mine[way] != expected] == []
                if tier == "archives":
                    assert mine["resumed"] == digest(batches[9:])
                    rows = slice(2 * tower_rank, 2 * tower_rank + 2)
                    halves = [dataclasses.replace(batch, images=batch.images[rows]) for batch in batches[:7]]
                    assert digest(mine["weird"]) == digest(halves)
            assert 13 not in {int(id) for batch in batches for id in batch.ids}


def test_who_makes_which_rows() -> None:
    assert [loader_shard(SPLIT, place(rank), 8) for rank in (0, 3)] == [(0, 4), (3, 4)]
    assert [loader_shard(REPLICATE, place(rank), 8) for rank in (0, 3)] == [(0, 2), (1, 2)]
    assert [loader_shard(SPLIT, place(rank, 1), 8) for rank in (0, 3)] == [(0, 4), (3, 4)]
    for parallel in (WEIRD, dataclasses.replace(WEIRD, feed="replicate")):
        assert loader_shard(parallel, place(2), 8) == (2, 4)
    assert loader_shard(REPLICATE, place(1), 6) == (0, 2)
    for parallel, batch, message in ((SPLIT, 6, "the 4 processes, each of which makes half .*; use parallel.feed: replicate"),
                                     (WEIRD, 6, "the 4 processes, .*; use parallel.scheme: towers and feed: replicate"),
                                     (REPLICATE, 7, "the 2 pairs of processes that share it; start")):
        with pytest.raises(ValueError, match=rf"train.batch \(={batch}\) must be divisible by {message}"):
            loader_shard(parallel, place(1), batch)
