"""Shuffling: the sample order of every epoch, (seed, epoch, position) → id, split by rank; resuming needs no replay.

The stream is the concatenation of the epochs' permutations, cut into global batches of equal size. Every sample comes exactly
once an epoch, nothing is dropped or padded, and a batch may hold the end of one epoch and the start of the next. Hence epochs
differ by at most one batch in length. B global batch, N samples, V windows of an epoch, n samples of a lane in it."""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.config import LANES, WINDOW
from pipeline.index.sample_index import SampleIndex
from pipeline.rng import Purpose, bits

Ids = npt.NDArray[np.int64]


def first_step(epoch: int, count: int, batch: int) -> int:
    """First step whose batch starts in `epoch` (0-based) for `count` samples and a global batch of `batch`."""
    return -(-epoch * count // batch)


def epoch_of(step: int, count: int, batch: int) -> int:
    """Epoch (0-based) in which the batch of `step` starts."""
    return step * batch // count


@dataclass
class Sampler:
    """A true permutation of the ids for every epoch, the same global order for any number of ranks. Raises ValueError for no
    samples, a batch larger than the set, or one that the shards do not divide."""
    ids: Ids  # (N,) of the split
    batch: int  # global batch B, over all ranks
    seed: int
    shard: tuple[int, int] = (0, 1)  # (k, n): this rank takes rows [k·B/n, (k+1)·B/n) of each global batch
    _orders: dict[int, Ids] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        rank, world = self.shard
        if not 0 <= rank < world:
            raise ValueError(f"shard (={self.shard}) must be (k, n) with 0 <= k < n; pass the rank and the number of ranks")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"seed (={self.seed}) must be in [0, 2**63); choose another")
        if self.batch < 1:
            raise ValueError(f"batch_size (={self.batch}) must be at least 1; raise it")
        if len(self.ids) == 0:
            raise ValueError("ids (=0 samples) must not be empty; the split has no usable sample, see alexnet index info")
        if self.batch > len(self.ids):
            raise ValueError(f"batch_size (={self.batch}) must not exceed the {len(self.ids)} samples of the split; lower it")
        if self.batch % world:
            raise ValueError(f"batch_size (={self.batch}) must be divisible by the {world} ranks that share it; it is "
                             "the global batch: change it")

    @property
    def share(self) -> int:
        """Samples of a batch that are this rank's, B/n."""
        return self.batch // self.shard[1]

    @property
    def settings(self) -> dict[str, int]:
        """What the order depends on besides seed, batch and ids; a run that resumes must have the same."""
        return {}

    def order(self, epoch: int) -> Ids:
        """(N,) int64 permutation of the ids of `epoch`: the ids sorted by 64 random bits each. 1.28 million ids take about 0.2
        s, so the order is kept for the epochs in flight."""
        order = self._orders.get(epoch)
        if order is None:
            order = self.ids[np.argsort(bits(self.seed, Purpose.ORDER, epoch, self.ids), kind="stable")]
            kept = {other: ids for other, ids in self._orders.copy().items() if abs(other - epoch) <= 1}
            self._orders = {**kept, epoch: order}
        return order

    def take(self, step: int) -> tuple[Ids, Ids]:
        """Ids and epochs, both (B/n,) int64, of this rank's rows of global batch `step`."""
        rank, share = self.shard[0], self.share
        positions = np.arange(share, dtype=np.int64) + (step * self.batch + rank * share)
        epochs, places = np.divmod(positions, len(self.ids))
        ids = np.empty(share, np.int64)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            ids[rows] = self.order(int(epoch))[places[rows]]
        return ids, epochs

    def epoch(self, step: int) -> int:
        return epoch_of(step, len(self.ids), self.batch)

    def steps(self, epoch: int) -> range:
        """The steps whose batches start in `epoch`."""
        return range(first_step(epoch, len(self.ids), self.batch), first_step(epoch + 1, len(self.ids), self.batch))


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
    """The order of tier streamed: a random order of shards, read front to back, shuffled within windows. For storage that only
    streams: object stores, spinning disks. Each sample exactly once an epoch, the same for any number of ranks.

    Still a function of (seed, epoch, position): the epoch's shards are permuted, their samples follow one another as they lie
    in the files, and this sequence is cut into L *lanes*, one for each L-th of the rows of a batch. Each lane is cut into
    windows, and each window is shuffled. So a rank reads only the lanes of its own rows. `window`: samples within which an
    epoch's order is shuffled, over all lanes; in memory twice. `lanes`: a set of less than `lanes` windows gets fewer. A rank
    of n reads an n-th of the bytes when n divides it. Raises ValueError as `Sampler`, and for either below 1."""

    def __init__(self, index: SampleIndex, ids: Ids, batch: int, seed: int, shard: tuple[int, int] = (0, 1), *,
                 window: int = WINDOW, lanes: int = LANES) -> None:
        super().__init__(ids, batch, seed, shard)
        for name, value in (("window", window), ("lanes", lanes)):
            if value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1; raise it")
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
