"""Loading for a pair of towers: each process makes half of the pair's images, and they exchange the halves on their devices.

The exchange of a batch is begun while the network computes the one before it. P images of a pair, c side of a crop.
"""
import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist

from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from train.config import ParallelConfig
from train.parallel.topology import Topology

_IMAGES_TAG, _IDS_TAG = 0, 1  # of messages; NCCL has none, and needs none
_CLOSE_S = 2.0  # a batch under way when the loader is closed has arrived by then, unless the other process is lost


def loader_shard(parallel: ParallelConfig, topology: Topology, batch: int) -> tuple[int, int]:
    """(k, n): this process's loader makes rows [k·batch/n, (k+1)·batch/n) of each global batch. Raises ValueError when the
    processes do not divide the batch."""
    if parallel.accumulate > max(1, batch // topology.data_ranks):
        raise ValueError(f"parallel.accumulate (={parallel.accumulate}) must be at most the {batch // topology.data_ranks} "
                         "images that each process computes; lower it")
    if batch % topology.data_ranks:
        sharing = "pairs of processes that share" if topology.tower_ranks > 1 else "processes that share"
        raise ValueError(f"train.batch (={batch}) must be divisible by the {topology.data_ranks} {sharing} it; start another "
                         "number of processes, or change the batch, and with it the run")
    if not _halved(parallel, topology):
        return topology.data_rank, topology.data_ranks
    if batch % topology.world_size:
        remedy = "parallel.feed: replicate" if parallel.scheme == "towers" else "parallel.scheme: towers and feed: replicate"
        raise ValueError(f"train.batch (={batch}) must be divisible by the {topology.world_size} processes, each of which makes "
                         f"half of a pair's images; use {remedy}, or another number of processes")
    return topology.global_rank, topology.world_size


def pair_loader(loader: TrainLoader, parallel: ParallelConfig, topology: Topology) -> "TrainLoader | PairLoader":
    """The loader of `loader_shard` itself, or, where each process makes half of a pair's images, one that joins the halves. A
    collective call."""
    if not _halved(parallel, topology):
        return loader
    first = topology.global_rank - topology.tower_rank
    # A group of its own: its messages must not queue with those of the layers.
    pair = dist.new_group([first, first + 1], use_local_synchronization=True, timeout=topology.timeout)
    assert isinstance(pair, dist.ProcessGroup)
    return PairLoader(loader, pair, exchange_images=parallel.scheme == "towers")


def _halved(parallel: ParallelConfig, topology: Topology) -> bool:
    return topology.tower_ranks == 2 and (parallel.feed == "split" or parallel.scheme == "weird")


@dataclass(frozen=True)
class _Exchange:
    """A batch whose other half is under way."""
    half: Batch  # what this process has made; kept, as it is being sent
    images: torch.Tensor  # (P, 3, c, c), or this process's half where only that is wanted
    ids_epochs: torch.Tensor  # (2, 2, P/2) int64 on the CPU: of each process's half, ids and epochs
    works: list[dist.Work]  # what to wait for


class PairLoader(Iterator[Batch]):
    """The batches of a pair, the same in both processes and the same as one process alone would make. Used as `TrainLoader` is.
    `loader` makes this process's half, rows in the order of the ranks of `pair`, a group of the two processes for this alone.
    Without `exchange_images` images stay halves, while labels, ids and epochs are of the pair."""

    def __init__(self, loader: TrainLoader, pair: dist.ProcessGroup, *, exchange_images: bool) -> None:
        self.loader, self._pair, self._exchange_images, self._rank = loader, pair, exchange_images, dist.get_rank(pair)
        self.monitor, self.note, self.threads = loader.monitor, loader.note, loader.threads
        self.quarantine = loader.quarantine
        self._next: _Exchange | Exception | None = None  # the next step's batch, or why there is none
        self.step = loader.step  # global batches consumed since the start of training
        self._end = loader.sampler.steps(self.epoch).stop

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self.loader.sampler.epoch(self.step)

    def __len__(self) -> int:
        return len(self.loader.sampler.steps(self.epoch))

    def __iter__(self) -> Self:
        self._end = self.loader.sampler.steps(self.epoch).stop
        return self

    def __next__(self) -> Batch:
        if self.step >= self._end:
            raise StopIteration
        exchange, self._next = self._next or self._begin(), None
        if isinstance(exchange, Exception):
            raise exchange
        device = exchange.images.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with self.monitor.waiting(exchange.half.step, stream, swap=True):
            for work in exchange.works:
                work.wait()  # on a GPU: make the device's stream wait
        ids, epochs = exchange.ids_epochs.transpose(0, 1).flatten(1).numpy()
        batch = Batch(exchange.images, self.loader.labels(ids), ids, epochs, exchange.half.step,
                      exchange.half.index)
        self.step += 1
        if self.step < self._end:
            try:
                self._next = self._begin()
            except Exception as error:  # raised for the next batch: this one is good
                self._next = error
        return batch

    def _begin(self) -> _Exchange:
        """Take the loader's next half and begin to send it."""
        half = next(iter(self.loader))
        ids_epochs = torch.empty(2, 2, len(half.ids), dtype=torch.int64)
        ids_epochs[self._rank, 0], ids_epochs[self._rank, 1] = torch.from_numpy(half.ids), torch.from_numpy(half.epochs)
        works = self._send_receive(ids_epochs, _IDS_TAG)
        if not self._exchange_images:
            return _Exchange(half, half.images, ids_epochs, works)
        last = not half.images.is_contiguous()  # channels_last, which the pair's images keep
        rows = half.images.permute(0, 2, 3, 1) if last else half.images
        images = rows.new_empty(2, *rows.shape)
        images[self._rank] = rows
        works += self._send_receive(images, _IMAGES_TAG)
        pair = images.flatten(0, 1)
        return _Exchange(half, pair.permute(0, 3, 1, 2) if last else pair, ids_epochs, works)

    def _send_receive(self, halves: torch.Tensor, tag: int) -> list[dist.Work]:
        """Send row `rank` of `halves` to the other process, and receive the other row from it."""
        peer = 1 - self._rank
        return dist.batch_isend_irecv([dist.P2POp(dist.isend, halves[self._rank], group=self._pair, tag=tag, group_peer=peer),
                                       dist.P2POp(dist.irecv, halves[peer], group=self._pair, tag=tag, group_peer=peer)])

    def state_dict(self) -> dict[str, int | str]:
        """The loader's, of the batches consumed here: the same for any number of processes."""
        return {**self.loader.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.loader.load_state_dict(state)
        self.step = self.loader.step
        self._end = self.loader.sampler.steps(self.epoch).stop

    def close(self) -> None:
        """Free threads and buffers. It can be used again, by both processes; it starts where it was."""
        exchange, self._next = self._next, None
        if isinstance(exchange, _Exchange):
            with contextlib.suppress(RuntimeError):  # a lost process is reported by training's own collectives
                for work in exchange.works:
                    work.wait(datetime.timedelta(seconds=_CLOSE_S))
        self.loader.close()
        if self.loader.step != self.step:
            self.loader.load_state_dict(self.state_dict())
