"""Feeding a pair of towers: each process makes half of the pair's images, and the halves are swapped on their device.

The swap of a batch is begun while the network computes the one before it. P rows of a pair's share of a batch, c side of a crop.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.sampling.sampler import epoch_of, first_step
from train.config import ParallelConfig
from train.parallel.topology import Topology

_IMAGES, _TOLD = 0, 1  # tags of messages; NCCL has none, and needs none
_PARTING_S = 2.0  # a swap that is under way when the loader is closed has both its sides, unless the other process is lost


def shard(parallel: ParallelConfig, where: Topology, batch: int) -> tuple[int, int]:
    """(k, n): this process's loader makes rows [k·batch/n, (k+1)·batch/n) of each global batch.

    Raises:
        ValueError: the processes do not divide the batch.
    """
    if parallel.accumulate > max(1, batch // where.data_ranks):
        raise ValueError(f"parallel.accumulate (={parallel.accumulate}) must be at most the {batch // where.data_ranks} images "
                         "that each process computes; lower it")
    if batch % where.data_ranks:
        whose = "pairs of processes that share" if where.tower_ranks > 1 else "processes that share"
        raise ValueError(f"train.batch (={batch}) must be divisible by the {where.data_ranks} {whose} it; start another number "
                         "of processes, or change the batch, and with it the run")
    if not _halved(parallel, where):
        return where.data_rank, where.data_ranks
    if batch % where.world_size:
        remedy = "parallel.feed: replicate" if parallel.scheme == "towers" else "parallel.scheme: towers and feed: replicate"
        raise ValueError(f"train.batch (={batch}) must be divisible by the {where.world_size} processes, each of which makes "
                         f"half of a pair's images; use {remedy}, or another number of processes")
    return where.global_rank, where.world_size


def fed(loader: TrainLoader, parallel: ParallelConfig, where: Topology) -> TrainLoader | Fed:
    """What the loop takes batches from: the loader of `shard` itself, or with the halves of a pair put together. All processes
    must ask."""
    if not _halved(parallel, where):
        return loader
    first = where.global_rank - where.tower_rank
    # A group of its own: its messages must not queue with those of the layers.
    pair = dist.new_group([first, first + 1], use_local_synchronization=True, timeout=where.timeout)
    assert isinstance(pair, dist.ProcessGroup)
    return Fed(loader, pair, images=parallel.scheme == "towers")


def _halved(parallel: ParallelConfig, where: Topology) -> bool:
    return where.tower_ranks == 2 and (parallel.feed == "split" or parallel.scheme == "weird")


@dataclass(frozen=True)
class _Swap:
    """A batch on its way.

    Attributes:
        half: what this process has made; kept, as it is being sent.
        images: (P, 3, c, c) with the other half on its way into it; the own half where only that is wanted.
        told: (2, 2, P/2) int64 on the CPU: ids and epochs of each process's half.
        works: what to wait for.
    """

    half: Batch
    images: torch.Tensor
    told: torch.Tensor
    works: list[dist.Work]


class Fed(Iterator[Batch]):
    """The batches of a pair's whole share, the same in both processes and the same as one of them would make alone.

    Used as `TrainLoader` is: each `for` gives the rest of an epoch. Close it after use.

    Args:
        loader: makes this process's half, rows in the order of the ranks of `pair`.
        pair: the two processes, a group for this alone.
        images: whether images are swapped; if not they stay halves, and labels, ids and epochs are of the whole share.
    """

    def __init__(self, loader: TrainLoader, pair: dist.ProcessGroup, *, images: bool = True) -> None:
        self.loader, self._pair, self._swapped, self._rank = loader, pair, images, dist.get_rank(pair)
        start = loader.state_dict()
        self._batch, self._samples = int(start["batch"]), int(start["samples"])
        self._ahead: _Swap | Exception | None = None  # of the next step: its batch, or why there is none
        self._step = int(start["step"])
        self._end = first_step(self.epoch + 1, self._samples, self._batch)

    @property
    def monitor(self) -> Monitor:
        """The loader's; what the swap is waited for counts as copying."""
        return self.loader.monitor

    @property
    def note(self) -> str:
        """What a person should know before it begins; mostly nothing."""
        return self.loader.note

    @property
    def threads(self) -> int:
        """Threads that decode."""
        return self.loader.threads

    @property
    def step(self) -> int:
        """Global batches consumed since the start of training."""
        return self._step

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return epoch_of(self._step, self._samples, self._batch)

    def __len__(self) -> int:
        """Batches of the current epoch, consumed ones included."""
        return (first_step(self.epoch + 1, self._samples, self._batch)
                - first_step(self.epoch, self._samples, self._batch))

    def __iter__(self) -> Self:
        self._end = first_step(self.epoch + 1, self._samples, self._batch)
        return self

    def __next__(self) -> Batch:
        if self._step >= self._end:
            raise StopIteration
        swap, self._ahead = self._ahead or self._begin(), None
        if isinstance(swap, Exception):
            raise swap
        batch = self._whole(swap)
        self._step += 1
        if self._step < self._end:
            try:
                self._ahead = self._begin()
            except Exception as failure:  # told when its batch is asked for: this one is good
                self._ahead = failure
        return batch

    def _begin(self) -> _Swap:
        """Take the loader's next half and send it on its way."""
        half = next(iter(self.loader))
        share, rank = len(half.ids), self._rank
        told = torch.empty(2, 2, share, dtype=torch.int64)
        told[rank, 0], told[rank, 1] = torch.from_numpy(half.ids), torch.from_numpy(half.epochs)
        works = self._exchange(told[rank], told[1 - rank], _TOLD)
        if not self._swapped:
            return _Swap(half, half.images, told, works)
        own = half.images.contiguous()
        images = own.new_empty(2, *own.shape)
        works += self._exchange(own, images[1 - rank], _IMAGES)
        images[rank] = own
        return _Swap(half, images.flatten(0, 1), told, works)

    def _exchange(self, own: torch.Tensor, other: torch.Tensor, tag: int) -> list[dist.Work]:
        peer = 1 - self._rank
        return dist.batch_isend_irecv([dist.P2POp(dist.isend, own, group=self._pair, tag=tag, group_peer=peer),
                                       dist.P2POp(dist.irecv, other, group=self._pair, tag=tag, group_peer=peer)])

    def _whole(self, swap: _Swap) -> Batch:
        """Wait for the other half (on a GPU: make the device's stream wait)."""
        device = swap.images.device
        with self.monitor.copying(swap.half.step, torch.cuda.current_stream(device) if device.type == "cuda" else None):
            for work in swap.works:
                work.wait()
        ids, epochs = swap.told.transpose(0, 1).flatten(1).numpy()
        return Batch(swap.images, self.loader.labels(ids), ids, epochs, swap.half.step)

    def state_dict(self) -> dict[str, int | str]:
        """The loader's, of the batches consumed here: the same for any number of processes."""
        return {**self.loader.state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TrainLoader.load_state_dict`."""
        self.close()
        self.loader.load_state_dict(state)
        self._step = self.loader.step
        self._end = first_step(self.epoch + 1, self._samples, self._batch)

    def close(self) -> None:
        """Free threads and buffers. It can be used again, by both processes; it starts where it was."""
        swap, self._ahead = self._ahead, None
        if isinstance(swap, _Swap):
            with contextlib.suppress(RuntimeError):  # of a process that is lost, others speak
                for work in swap.works:
                    work.wait(datetime.timedelta(seconds=_PARTING_S))
        self.loader.close()
        if self.loader.step != self._step:
            self.loader.load_state_dict(self.state_dict())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
