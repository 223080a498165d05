"""The order of tier streamed: a random order of shards, read front to back, shuffled within windows.

For storage that only streams: object stores, spinning disks. The order is still a function of (seed, epoch, position): the
epoch's shards are permuted, their samples follow one another as they lie in the files, and this sequence is cut into L *lanes*,
one for each L-th of the rows of a batch. Each lane is cut into windows, and each window is shuffled. So a rank reads only the
lanes of its own rows, and the stream is the same for any number of ranks.
B global batch, N samples, V windows of an epoch, n samples of a lane in an epoch."""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import LANES, WINDOW
from pipeline.index.sample_index import SampleIndex
from pipeline.rng import Purpose, bits
from pipeline.sampling.sampler import Ids, Sampler


@dataclass(frozen=True)
class EpochPlan:
    """An epoch's order, and how it is read."""
    order: Ids  # (N,) ids by position
    sequence: Ids  # (N,) ids as they are read, lane after lane
    slots: Ids  # (N,) place in `sequence` of the i-th id of the split
    bounds: Ids  # (V + 1,) places in `sequence` where windows begin, and N
    lanes: Ids  # (V,) lane of each window
    last_steps: Ids  # (V,) global batch that uses a window last


@dataclass(frozen=True)
class Passage:
    """What one lane reads in one epoch."""
    epoch: int  # from 0
    ids: Ids  # (n,) samples in the order they lie in the shards
    windows: Ids  # (n,) number of each sample's window, ascending
    last_steps: dict[int, int]  # last global batch that uses a window, by its number


class WindowSampler(Sampler):
    """The order of tier streamed: each sample exactly once an epoch, the same for any number of ranks. `window`: samples
    within which an epoch's order is shuffled, over all lanes; in memory twice. `lanes`: sequences of reading; a set of less
    than `lanes` windows gets fewer. A rank of n reads an n-th of the bytes when n divides it. Raises ValueError as `Sampler`,
    and for either below 1."""

    def __init__(self, index: SampleIndex, ids: Ids, batch: int, seed: int, shard: tuple[int, int] = (0, 1), *,
                 window: int = WINDOW, lanes: int = LANES) -> None:
        super().__init__(ids, batch, seed, shard)
        for name, value in (("window", window), ("lanes", lanes)):
            if value < 1:
                raise ValueError(f"data.{name} (={value}) must be at least 1; correct the recipe")
        self.window = window
        self.lanes = max(1, min(lanes, batch, len(ids) // window))
        rows = index.samples[ids]
        self._shards, self._shard_of = np.unique(rows["archive"].astype(np.int64), return_inverse=True)
        self._offsets = rows["offset"].astype(np.int64)
        self._plans: dict[int, EpochPlan] = {}

    @property
    def settings(self) -> dict[str, int]:
        return {"window": self.window, "lanes": self.lanes}

    def own_lanes(self) -> list[int]:
        """The lanes that hold this rank's rows."""
        rows = np.arange(self.share, dtype=np.int64) + self.shard[0] * self.share
        return np.unique(rows * self.lanes // self.batch).tolist()

    def order(self, epoch: int) -> Ids:
        return self.plan(epoch).order

    def plan(self, epoch: int) -> EpochPlan:
        """How `epoch` is read and shuffled; about 0.5 s for 1.28 million samples, so it is kept for the epochs in flight."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make(epoch)
            self._plans = {**{other: old for other, old in self._plans.copy().items() if abs(other - epoch) <= 1}, epoch: plan}
        return plan

    def _make(self, epoch: int) -> EpochPlan:
        count = len(self.ids)
        ranks = np.argsort(np.argsort(bits(self.seed, Purpose.SHARD, epoch, self._shards), kind="stable"))
        read = np.lexsort((self._offsets, ranks[self._shard_of]))
        sequence = self.ids[read]
        rows = (epoch * count + np.arange(count, dtype=np.int64)) % self.batch
        lane_of = (rows * self.lanes // self.batch).astype(np.int16)
        positions = np.argsort(lane_of, kind="stable")
        sizes = np.bincount(lane_of, minlength=self.lanes)
        bounds, lanes, low = [], [], 0
        for lane, size in enumerate(sizes.tolist()):
            # Windows of nearly equal size: a short last one could lack a stand-in.
            parts = min(size, -(-size * self.lanes // self.window))
            bounds += [low + part * size // parts for part in range(parts)]
            lanes += [lane] * parts
            low += size
        edges = np.array([*bounds, count], np.int64)
        number = np.repeat(np.arange(len(lanes)), np.diff(edges))
        mixed = np.lexsort((bits(self.seed, Purpose.WINDOW, epoch, sequence), number))
        order, slots = np.empty(count, np.int64), np.empty(count, np.int64)
        order[positions] = sequence[mixed]
        slots[read] = np.arange(count)
        last_steps = (epoch * count + positions[edges[1:] - 1]) // self.batch  # positions ascend within a lane
        return EpochPlan(order, sequence, slots, edges, np.array(lanes, np.int64), last_steps)

    def locate(self, epoch: int, ids: Ids) -> tuple[Ids, Ids]:
        """Lane and window of samples `ids` in `epoch`, (B,) int64 each."""
        plan = self.plan(epoch)
        windows = np.searchsorted(plan.bounds, plan.slots[np.searchsorted(self.ids, ids)], "right") - 1
        return plan.lanes[windows], windows

    def passages(self, lane: int, step: int) -> Iterator[Passage]:
        """What `lane` reads from global batch `step` on, epoch after epoch."""
        for epoch in itertools.count(self.epoch(step)):
            plan = self.plan(epoch)
            numbers = np.flatnonzero((plan.lanes == lane) & (plan.last_steps >= step))
            if len(numbers):
                low, high = int(plan.bounds[numbers[0]]), int(plan.bounds[numbers[-1] + 1])
                windows = np.searchsorted(plan.bounds, np.arange(low, high), "right") - 1
                last = dict(zip(numbers.tolist(), plan.last_steps[numbers].tolist(), strict=True))
                yield Passage(epoch, plan.sequence[low:high], windows, last)
