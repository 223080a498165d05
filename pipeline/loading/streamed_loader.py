"""Tier streamed: packed shards read front to back, in a random order of shards, shuffled within windows.

For storage that only streams: object stores, spinning disks. The order is still a function of (seed, epoch, position), outside
DALI: the epoch's shards are permuted, their samples follow one another as they lie in the files, and this sequence is
cut into L *lanes*, one for each L-th of the rows of a batch. Each lane is cut into windows, and each window is shuffled. So a
rank reads only the lanes of its own rows, and the stream is the same for any number of ranks.
B global batch, N samples, V windows of an epoch.
"""
import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import rng as counter
from pipeline.config import LANES, WINDOW, DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Meter
from pipeline.reading.source import Bytes, Quarantine, SampleError
from pipeline.sampling.sampler import Ids, Sampler, epoch_of
from pipeline.reading.shard_source import Lane, Passage, Window
from pipeline.stats import Stats
from pipeline.decoding.decoder import Prepared

_SUBSTITUTES = 100


@dataclass(frozen=True)
class EpochPlan:
    """An epoch's order, and how it is read.

    Attributes:
        order: (N,) int64 ids by position.
        sequence: (N,) int64 ids as they are read, lane after lane.
        slots: (N,) int64 place in `sequence` of the i-th id of the split.
        bounds: (V + 1,) int64 places in `sequence` where windows begin, and N.
        lanes: (V,) int64 lane of each window.
        last_steps: (V,) int64 global batch that uses a window last.
    """
    order: Ids
    sequence: Ids
    slots: Ids
    bounds: Ids
    lanes: Ids
    last_steps: Ids

    def windows(self, low: int, high: int) -> Ids:
        """Number of the window of each of the places low…high-1 of `sequence`."""
        return np.searchsorted(self.bounds, np.arange(low, high), "right") - 1


class StreamedSampler(Sampler):
    """The order of tier streamed: each sample exactly once an epoch, the same for any number of ranks.

    Args:
        index, ids, batch, seed, shard: as for `Sampler`; ids of `index`.
        window: samples within which an epoch's order is shuffled, over all lanes; in memory twice.
        lanes: sequences of reading; a set of less than `lanes` windows gets fewer. A rank of n reads an n-th of the bytes when n
            divides it.

    Raises:
        ValueError: as `Sampler`; window or lanes below 1.
    """

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

    def own_lanes(self) -> list[int]:
        """The lanes that hold this rank's rows."""
        rows = np.arange(self.share, dtype=np.int64) + self.shard[0] * self.share
        return np.unique(rows * self.lanes // self.batch).tolist()

    def order(self, epoch: int) -> Ids:
        """(N,) int64 ids of `epoch` by position."""
        return self.plan(epoch).order

    def plan(self, epoch: int) -> EpochPlan:
        """How `epoch` is read and shuffled; about 0.5 s for 1.28 million samples, so it is kept for the epochs in flight."""
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._make(epoch)
            self._plans = {**{other: old for other, old in self._plans.copy().items() if abs(other - epoch) <= 1}, epoch: plan}
        return plan

    def _make(self, epoch: int) -> EpochPlan:
        count, purpose = len(self.ids), counter.Purpose
        ranks = np.argsort(np.argsort(counter.bits(self.seed, purpose.SHARD, epoch, self._shards), kind="stable"))
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
        mixed = np.lexsort((counter.bits(self.seed, purpose.WINDOW, epoch, sequence), number))
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
        for epoch in itertools.count(epoch_of(step, len(self.ids), self.batch)):
            plan = self.plan(epoch)
            numbers = np.flatnonzero((plan.lanes == lane) & (plan.last_steps >= step))
            if len(numbers):
                low, high = int(plan.bounds[numbers[0]]), int(plan.bounds[numbers[-1] + 1])
                last = dict(zip(numbers.tolist(), plan.last_steps[numbers].tolist(), strict=True))
                yield Passage(epoch, plan.sequence[low:high], plan.windows(low, high), last)


class StreamedLoader(TrainLoader):
    """Training batches from packed shards that are only read forwards: what `TrainLoader` gives, in another order.

    Args:
        index: of a packed folder (tools/pack_shards.py): its shards are random already, so that windows are.
        window, lanes: see `StreamedSampler`; they are part of the order.
        store: ``s3://bucket/prefix`` under which the shards lie by base name; empty: where the index finds them.
        The rest as for `TrainLoader`.

    Raises:
        ValueError: as `TrainLoader`; the index is no packed one, or `store` no s3 address.
        RuntimeError: as `TrainLoader`; a shard is missing, cut, or cannot be read.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 window: int = WINDOW, lanes: int = LANES, store: str = "", machine: LoaderConfig = LoaderConfig(),
                 shard: tuple[int, int] = (0, 1), device_id: int | None = None, quarantine: Quarantine | None = None,
                 meter: Meter | None = None) -> None:
        if index.packed is None:
            raise ValueError(f"index (={index.path}) must be of packed shards to be streamed: archives sorted by class would "
                             "give windows of one class; write shards with tools/pack_shards.py, and set data.packed")
        if store and not (store.startswith("s3://") and len(store) > len("s3://")):
            raise ValueError(f"machine.archives (={store}) must be s3://bucket/prefix to be streamed from; correct it, or leave "
                             "it out to read the shards where the index finds them")
        super().__init__(index, split, data, batch, seed, stats, machine=machine, shard=shard, device_id=device_id,
                         quarantine=quarantine, meter=meter)
        self._sampler: StreamedSampler = StreamedSampler(index, self._ids, batch, seed, shard, window=window, lanes=lanes)
        self._store = store
        self._lanes: dict[int, Lane] = {}

    def _where(self, position: int) -> str:
        if self._store:
            return f"{self._store.rstrip('/')}/{self.index.archives[position].path.name}"
        try:
            return str(self.index.archive_path(position))
        except ValueError as error:  # it was there when the run began: the world's fault by now
            raise RuntimeError(str(error)) from error

    def _produce(self, first: int) -> Generator[Batch, None, None]:
        with contextlib.ExitStack() as stack:
            self._lanes = {}
            for lane in self._sampler.own_lanes():
                opened = Lane(self.index, self._sampler.passages(lane, first), self._where, crc=self.machine.check_crc)
                self._lanes[lane] = stack.enter_context(contextlib.closing(opened))
            yield from super()._produce(first)

    def _windows(self, epochs: Ids, ids: Ids) -> list[Window]:
        """The windows in which samples `ids` lie in `epochs`, (B,) each."""
        found: dict[int, Window] = {}
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            lanes, windows = self._sampler.locate(epoch, ids[rows])
            for row, lane, window in zip(rows.tolist(), lanes.tolist(), windows.tolist(), strict=True):
                found[row] = self._lanes[lane].window((epoch, window), self._step)
        return [found[row] for row in range(len(ids))]

    def _prepare(self, step: int) -> Prepared:
        origins, epochs = self._sampler.take(step)
        ids, tries = origins.copy(), np.zeros_like(origins)
        views: list[Bytes] = []
        for row, window in enumerate(self._windows(epochs, origins)):
            try:
                views.append(window.read(int(ids[row])))
            except SampleError as error:
                ids[row], tries[row], view = self._substitute(error, int(origins[row]), 0, int(epochs[row]), step)
                views.append(view)
        return self._assemble(step, ids, epochs, views, origins, tries)

    def _substitute(self, error: SampleError, origin: int, tries: int, epoch: int, step: int) -> tuple[int, int, Bytes]:
        """As `TrainLoader`'s, from the window of `origin`: no other sample's bytes are there on every rank."""
        (window,) = self._windows(np.array([epoch]), np.array([origin]))
        for attempt in range(tries, _SUBSTITUTES):
            drawn = counter.bits(self._seed, counter.Purpose.SUBSTITUTE, epoch, origin, attempt)[0]
            candidate = int(window.ids[int(drawn % np.uint64(len(window.ids)))])
            if candidate == origin:
                continue
            at = self._where(int(self.index.samples[error.id]["archive"])) if self._store else ""
            self._quarantine.add(self.index, error, archive=at, member=window.name(error.id), epoch=epoch, step=step,
                                 substitute=candidate)
            try:
                return candidate, attempt + 1, window.read(candidate)
            except SampleError as other:
                error = other
        raise RuntimeError(f"sample {origin} has no readable stand-in in its window of {len(window.ids)} samples; the last one: "
                           f"{error}; or raise data.window") from error

    def state_dict(self) -> dict[str, int | str]:
        """As `TrainLoader`'s, and what the order depends on besides."""
        return {**super().state_dict(), "window": self._sampler.window, "lanes": self._sampler.lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TrainLoader`'s. Raises ValueError also for a state of another tier's order, window or lanes."""
        mine = self.state_dict()
        for key in ("window", "lanes"):
            if state.get(key) != mine[key]:
                raise ValueError(f"loader state {key} (={state.get(key)}) must equal this loader's (={mine[key]}); resume with "
                                 "the recipe the run was started with")
        super().load_state_dict(state)
