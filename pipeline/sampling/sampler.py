"""Shuffling: the sample order of every epoch, (seed, epoch, position) → id, split by rank; resuming needs no replay.

The stream is the concatenation of the epochs' permutations, cut into global batches of equal size. Every sample comes exactly
once an epoch, nothing is dropped or padded, and a batch may hold the end of one epoch and the start of the next. Hence epochs
differ by at most one batch in length. B global batch, N samples."""
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

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
        if self.batch < 1:
            raise ValueError(f"batch (={self.batch}) must be at least 1; correct the recipe")
        if len(self.ids) == 0:
            raise ValueError("ids (=0 samples) must not be empty; the split has no usable sample, see build_index.py info")
        if self.batch > len(self.ids):
            raise ValueError(f"batch (={self.batch}) must not exceed the {len(self.ids)} samples of the split; lower it")
        if self.batch % world:
            raise ValueError(f"batch (={self.batch}) must be divisible by the {world} ranks that share it; "
                             "change the global batch")

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
