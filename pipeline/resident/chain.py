"""`ResidentChain`: batches out of memory; the first epoch (or pass) fills the store, after it nothing is read or decoded.

The same order, augmentation, stand-ins and `Batch` as from archives. The pixels too, but for at most 5 values in a million that
are one grey level off, because the resize of a whole square adds up at other float positions than that of a crop (about 1 in a
million on photographs); with ``yuv420`` they differ as `pipeline.resident.yuv420` says. A crop is exactly the crop of the square
that an evaluation gives.

N samples, B of a batch, S side of a square, R images that the processes sharing a `GpuStore` train on together in a step.
"""
import itertools
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from pipeline.decoding.normalize import Normalizer
from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.chain import Chain
from pipeline.loading.eval_loader import Evaluation
from pipeline.loading.prefetch import one_ahead
from pipeline.reading.quarantine import SampleError, Skip, StandIns
from pipeline.reading.source import ArchiveSource
from pipeline.resident.filler import Filler
from pipeline.resident.gpu_store import GpuStore
from pipeline.resident.layout import Layout
from pipeline.resident.ram_store import RamStore
from pipeline.resident.store import Crops, Rows, Store
from pipeline.sampling.augment import Augmentation
from pipeline.sampling.batch_plan import CropPlanner
from pipeline.sampling.sampler import Ids, Sampler

_AT_LEAST = 64  # squares that may be decoded together, however small the batch


@dataclass(frozen=True)
class Request:
    """What a batch takes from the store: ids, epochs (B,) and augmentation of this process's images; the crops of all processes
    that take part, by rank."""
    ids: Ids
    epochs: Ids
    augmentation: Augmentation
    crops: list[Crops]


class TrainRequests:
    """What training batches need: random crops, and stand-ins for corrupt samples.

    Args:
        index: of the samples.
        store, filler: of the squares.
        sampler, planner: this process's order, and crops.
        stand_ins: for corrupt samples.
        skipped: those the filler has met, id → reason.
    """

    def __init__(self, context: LoaderContext, store: Store, filler: Filler, sampler: Sampler, planner: CropPlanner,
                 stand_ins: StandIns, skipped: dict[int, str]) -> None:
        self._index, self._pool = context.index, ArchiveSource(context.index, context.ids)
        self._filler, self._planner, self._stand_ins, self._skipped = filler, planner, stand_ins, skipped
        rank, ranks = store.share(sampler.shard)
        self._share = np.arange(rank, len(sampler.ids), ranks)
        # Of each global batch the R rows of every process that shares the store; this one's are at `_own` among them.
        batch = sampler.batch
        self._global = Sampler(sampler.ids, batch, sampler.seed)
        taken = [np.arange(k * batch // n, (k + 1) * batch // n) for k, n in store.shards(sampler.shard)]
        self._taken, ends = np.concatenate(taken), list(itertools.accumulate(map(len, taken)))
        self._parts = [slice(end - len(rows), end) for rows, end in zip(taken, ends, strict=True)]
        self._own = self._parts[store.rank]

    def _take(self, step: int) -> tuple[Ids, Ids]:
        """Ids and epochs, both (R,), of what the processes sharing the store train on in `step`, rank by rank."""
        ids, epochs = self._global.take(step)
        return ids[self._taken], epochs[self._taken]

    def rows(self, step: int) -> Rows:
        """The rows that batch `step` needs, before any stand-in."""
        return self._filler.rows(self._take(step)[0])

    def chunks(self) -> list[Rows]:
        """All rows this process fills beforehand."""
        return [self._share[low:low + self._filler.chunk] for low in range(0, len(self._share), self._filler.chunk)]

    def request(self, step: int) -> Request:
        """What batch `step` takes; afterwards it is in the store."""
        origins, epochs = self._take(step)
        ids, attempts = origins.copy(), np.zeros_like(origins)
        while True:
            rows = self._filler.rows(ids)
            self._filler.fill(rows)
            broken = np.flatnonzero(self._filler.failed[rows]).tolist()
            if not broken:
                break
            for row in broken:
                reason = self._skipped.get(int(ids[row]), "cannot be read by the process that holds it")
                error = SampleError(self._index, int(ids[row]), reason)
                ids[row], attempts[row] = self._stand_ins.choose(error, self._pool, int(origins[row]), int(attempts[row]),
                                                                 int(epochs[row]), step)
        chosen, own = self._planner.augmentation(ids, epochs), self._own
        crops = [(rows[part], chosen.top[part], chosen.left[part]) for part in self._parts]
        return Request(ids[own], epochs[own], chosen.rows(own), crops)


class EvalRequests:
    """What the batches of an evaluation need: whole squares, without the samples left out."""

    def __init__(self, evaluation: Evaluation, store: Store, filler: Filler) -> None:
        self._evaluation, self._store, self._filler = evaluation, store, filler

    def rows(self, step: int) -> Rows:
        """As `TrainRequests.rows`."""
        return self._filler.rows(self._evaluation.samples(step))

    def chunks(self) -> list[Rows]:
        """As `TrainRequests.chunks`."""
        return [self.rows(step) for step in self._evaluation.steps]

    def request(self, step: int) -> Request:
        """As `TrainRequests.request`."""
        ids, rows = self._evaluation.samples(step), self.rows(step)
        self._filler.fill(rows)
        kept = self._store.stored[rows] == 1
        corner = np.zeros(np.count_nonzero(kept), np.int64)
        unchanged = Augmentation.none(len(corner), self._evaluation.channel_mean)
        return Request(ids[kept], corner, unchanged, [(rows[kept], corner, corner)])


class ResidentChain:
    """A `Chain` whose store takes the place of reading and decoding.

    Args:
        context: settings, device, monitor.
        store, filler: the squares, and what fills them.
        requests: what the batches need.
        mean_image: to be subtracted, or None, see `Normalizer`.
    """
    stages: tuple[str, ...] = ("normalize",)

    def __init__(self, context: LoaderContext, store: Store, filler: Filler, requests: TrainRequests | EvalRequests,
                 mean_image: npt.NDArray[np.float32] | None) -> None:
        self.context, self.store, self.filler, self.requests, self.note = context, store, filler, requests, store.note
        self.normalizer = partial(context.normalizer, store.layout.crop_px, mean_image)
        # An exchange must not run ahead of the batches consumed: a rank that stops would leave the others waiting in it.
        self.queue = 0 if store.exchanges else context.queue

    @property
    def filled(self) -> tuple[int, int]:
        return int(np.count_nonzero(self.store.have)), len(self.store.have)

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        with closing(self.normalizer()) as normalizer, closing(self.filler):
            self.filler.expect(map(self.requests.rows, steps))
            yield from one_ahead(filter(None, map(partial(self._begin, normalizer), steps)))

    def _begin(self, normalizer: Normalizer, step: int) -> Callable[[], Batch] | None:
        """Begin a batch; None when all of it was left out."""
        self.context.monitor.enter("read")
        request = self.requests.request(step)
        if not len(request.ids):
            return None
        end = normalizer.begin(self.store.crops(request.crops), request.augmentation)
        return partial(self.context.normalized, step, request.ids, request.epochs, end)

    def until(self, stage: str, steps: range) -> Generator[object, None, None]:
        return {"normalize": self.batches}[stage](steps)

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the store now, instead of in the first epoch: all of it, or this process's part of a `RamStore`."""
        chunks, done = self.requests.chunks(), 0
        with closing(self.filler):
            self.filler.expect(iter(chunks))
            for rows in chunks:
                self.filler.fill(rows)
                done += len(rows)
                if progress is not None:
                    progress(done, sum(map(len, chunks)))
        self.context.monitor.enter("idle")

    def close(self) -> None:
        self.store.close()


def _ram_store(context: LoaderContext, layout: Layout, *, make: bool = True) -> RamStore:
    folder = Path(context.machine.resident_folder or context.index.path / "resident")
    return RamStore(folder, context.split, context.index.split_sha256(context.split), len(context.ids), layout,
                    device=context.device, threads=context.threads, make=make)


def train_chain(context: LoaderContext, kind: str, sampler: Sampler, planner: CropPlanner, stand_ins: StandIns,
                mean_image: npt.NDArray[np.float32] | None, group: dist.ProcessGroup | None) -> ResidentChain:
    """The chain of tier resident for training, `machine.resident_memory`:

    - ``ram``: a file in `machine.resident_folder` that all processes of a node map, see `RamStore`. It outlives them.
    - ``gpu``: spread over the processes of `group`, see `GpuStore`; in `device_id`'s memory, or else the processes'.

    Corrupt samples are tried again by the next process.

    Args:
        kind: layout of the squares, ``rgb`` or ``yuv420``.
        group: the node's processes, for ``gpu`` only, and for this loader alone; all of them must take the same batches. None:
            there is one process.

    Raises:
        ValueError: `data.region` is not the square, another kind.
        RuntimeError: the squares do not fit (the message names what would), the folder cannot be written.
    """
    data, skip = context.data, Skip()
    if data.region != "square":
        raise ValueError(f"data.region (={data.region}) must be square for tier resident, which keeps central squares only; "
                         "use data.tier: archives or packed")
    layout = Layout(kind, data.square_px, data.crop_px)
    store: Store = (_ram_store(context, layout) if context.machine.resident_memory == "ram" else
                    GpuStore(len(context.ids), layout, context.device, group))
    filler = Filler(context, store, context.ids, max(2 * sampler.share, _AT_LEAST), skip, skip.skipped, complete=True)
    requests = TrainRequests(context, store, filler, sampler, planner, stand_ins, skip.skipped)
    return ResidentChain(context, store, filler, requests, mean_image)


def eval_chain(evaluation: Evaluation, kind: str, keep: bool) -> Chain:
    """The chain of tier resident for evaluation, `machine.resident_memory`:

    - ``ram``: a file of the split, as for training: of all processes of a node, which fill it together; later runs read it.
    - ``gpu``: in `device_id`'s memory (or else the process's), the squares of this process's own batches, which are the same in
      every pass, so that none has to be exchanged; they end with the loader.

    Args:
        kind: layout of the squares, ``rgb`` or ``yuv420``.
        keep: False for a split that is evaluated once: a file in ``ram`` that has all of the squares is read, and else every pass
            decodes, and nothing is stored. The images are the same.

    Raises:
        ValueError: another kind, or samples that are not of the split.
        RuntimeError: the squares do not fit (the message names what would), the folder cannot be written.
    """
    context, ids, side = evaluation.context, evaluation.context.ids, evaluation.context.data.square_px
    layout = Layout(kind, side, side)  # a "crop" is the whole square here
    if not np.isin(evaluation.ids, ids).all():
        raise ValueError(f"ids (={len(evaluation.ids)} samples) must be of split {context.split}, whose images are kept; leave "
                         "out the others")
    store: Store | None = None
    try:
        if context.machine.resident_memory == "ram":
            store = _ram_store(context, layout, make=keep)
        elif keep:
            ids = np.unique(np.concatenate([ids[:0], *map(evaluation.samples, evaluation.steps)]))
            store = GpuStore(len(ids), layout, context.device)
    except RuntimeError as error:
        if keep:
            raise RuntimeError(f"split {context.split}, whose squares tests keep in memory: {error}") from error
    if store is None or not (keep or store.stored.all()):
        return evaluation.decoding_chain(None if kind == "rgb" else layout.restored)
    filler = Filler(context, store, ids, evaluation.batch, evaluation.policy, evaluation.skipped, complete=False)
    return ResidentChain(context, store, filler, EvalRequests(evaluation, store, filler), evaluation.mean_image)
