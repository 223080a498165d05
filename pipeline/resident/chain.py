"""`ResidentChain`: batches out of memory; the first epoch (or pass) fills the store, after it nothing is read or decoded.

The same order, augmentation, stand-ins and `Batch` as from archives. The pixels too, but for at most 5 values in a million
(about 1 on photographs) that are one grey level off, because the resize of a whole square adds up at other float positions
than that of a crop; with ``yuv420`` they differ as `pipeline.resident.yuv420` says. N samples, B of a batch, S side of a
square, R images that the processes sharing a `GpuStore` train on together in a step."""
import itertools
from abc import abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from pipeline.decoding.normalize import Normalizer
from pipeline.decoding.resize import planar_boxes
from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.loader import Chain
from pipeline.loading.eval_loader import Evaluation
from pipeline.loading.prefetch import one_ahead
from pipeline.reading.quarantine import SampleError, Skip, StandIns
from pipeline.reading.source import ArchiveSource
from pipeline.resident.device import DeviceNormalizer
from pipeline.resident.filler import Filler
from pipeline.resident.gpu_store import GpuStore
from pipeline.resident.ram_store import RamStore
from pipeline.resident.store import Crops, Layout, Rows, Store
from pipeline.sampling.augment import Augmentation
from pipeline.sampling.batch_plan import BlockPlanner, CropPlanner
from pipeline.sampling.sampler import Ids, Sampler

_AT_LEAST = 64  # squares that may be decoded together, however small the batch


class StoreRequest(NamedTuple):
    """What a batch takes from the store."""
    ids: Ids  # (B,) of this process's images; so the next two
    epochs: Ids
    augmentation: Augmentation
    crops: list[Crops]  # of all processes that take part, by rank


class ResidentChain(Chain):
    """A `Chain` whose store takes the place of reading and decoding."""
    stages = ("normalize",)
    _box_px: int | None = None  # side to which boxes of the squares are resized; None: the store's crops are the images

    def __init__(self, context: LoaderContext, store: Store, filler: Filler, mean_image: npt.NDArray[np.float32] | None) -> None:
        self.context, self.store, self.filler, self.note = context, store, filler, store.note
        machine = context.machine
        self._on_device = context.device.type == "cuda" or machine.kernels == "triton"
        side = self._box_px or store.layout.crop_px
        self.normalizer: Callable[[], Normalizer | DeviceNormalizer] = partial(
            DeviceNormalizer, store.layout, context.finish(mean_image), context.device, kernels=machine.kernels,
            crop_px=self._box_px) if self._on_device else partial(context.normalizer, side, mean_image)
        # An exchange must not run ahead of the batches consumed: a rank that stops would leave the others waiting in it.
        self.queue = 0 if store.exchanges else machine.queue

    @abstractmethod
    def rows(self, step: int) -> Rows:
        """The rows that batch `step` needs, before any stand-in."""

    @abstractmethod
    def request(self, step: int) -> StoreRequest:
        """What batch `step` takes; afterwards it is in the store."""

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        with closing(self.normalizer()) as normalizer, closing(self.filler):
            self.filler.expect(map(self.rows, steps))
            yield from one_ahead(filter(None, map(partial(self._begin, normalizer), steps)))

    def _begin(self, normalizer: Normalizer | DeviceNormalizer, step: int) -> Callable[[], Batch] | None:
        """Begin a batch; None when all of it was left out."""
        self.context.monitor.enter("read")
        request = self.request(step)
        if not len(request.ids):
            return None
        return partial(self.context.normalized, step, request.ids, request.epochs, self.images(normalizer, request))

    def images(self, normalizer: Any, request: StoreRequest) -> Callable[[], Tensor]:
        """Begin to make the images of a batch with the `normalizer` of this chain; gives what waits for them."""
        chosen = request.augmentation
        crops: Any = self.store.located(request.crops) if self._on_device else self.store.crops(request.crops)
        if chosen.box is not None and self._box_px is not None and not self._on_device:
            crops = planar_boxes(crops, chosen.top.tolist(), chosen.left.tolist(), chosen.box.tolist(), self._box_px)
        end: Callable[[], Tensor] = normalizer.begin(crops, chosen)
        return end

    def close(self) -> None:
        self.store.close()


class TrainChain(ResidentChain):
    """Training batches: random crops, and stand-ins for corrupt samples."""

    def __init__(self, context: LoaderContext, store: Store, sampler: Sampler, planner: CropPlanner, stand_ins: StandIns,
                 mean_image: npt.NDArray[np.float32] | None) -> None:
        skip = Skip()
        self._box_px = context.data.crop_px if context.data.resized_boxes else None
        super().__init__(context, store, Filler(context, store, context.ids, max(2 * sampler.share, _AT_LEAST), skip,
                                                skip.skipped, complete=True), mean_image)
        self._pool, self._planner, self._stand_ins = ArchiveSource(context.index, context.ids), planner, stand_ins
        self._skipped = skip.skipped
        # Of each global batch the R rows of every process that shares the store; this one's are at `_own` among them.
        batch, self._shard = sampler.batch, sampler.shard
        self._global = Sampler(sampler.ids, batch, sampler.seed)
        taken = [np.arange(k * batch // n, (k + 1) * batch // n) for k, n in store.shards(sampler.shard)]
        self._taken, ends = np.concatenate(taken), list(itertools.accumulate(map(len, taken)))
        self._parts = [slice(end - len(rows), end) for rows, end in zip(taken, ends, strict=True)]
        self._own = self._parts[store.rank]
        self._plan = BlockPlanner(self._take, len(self._taken), planner)

    def _take(self, step: int) -> tuple[Ids, Ids]:
        """Ids and epochs, both (R,), of what the processes sharing the store train on in `step`, rank by rank."""
        ids, epochs = self._global.take(step)
        return ids[self._taken], epochs[self._taken]

    def rows(self, step: int) -> Rows:
        return self.filler.rows(self._take(step)[0])

    def fill(self) -> None:
        """Fill the store now, instead of in the first epoch. Processes that share a `RamStore` begin at different rows."""
        rank, ranks = (0, 1) if self.store.exchanges else self._shard
        rows = np.roll(np.arange(len(self.store.have)), -rank * len(self.store.have) // ranks)
        chunks = [rows[low:low + self.filler.chunk] for low in range(0, len(rows), self.filler.chunk)]
        with closing(self.filler):
            self.filler.expect(iter(chunks))
            for chunk in chunks:
                self.filler.fill(chunk)
        self.context.monitor.enter("idle")

    def request(self, step: int) -> StoreRequest:
        plan, own = self._plan(step), self._own
        origins, epochs, chosen = plan.ids, plan.epochs, plan.augmentation
        ids, attempts = origins.copy(), np.zeros_like(origins)
        while True:
            rows = self.filler.rows(ids)
            self.filler.fill(rows)
            broken = np.flatnonzero(self.filler.failed[rows]).tolist()
            if not broken:
                break
            for row in broken:
                reason = self._skipped.get(int(ids[row]), "cannot be read by the process that holds it")
                error = SampleError(self.context.index, int(ids[row]), reason)
                ids[row], attempts[row] = self._stand_ins.choose(error, self._pool, int(origins[row]), int(attempts[row]),
                                                                 int(epochs[row]), step)
        if attempts.any():
            chosen = self._planner.augmentation(ids, epochs)
        corner = np.zeros_like(chosen.top)  # of the store's crops: a box is resized from the whole square
        top, left = (chosen.top, chosen.left) if chosen.box is None else (corner, corner)
        crops = [(rows[part], top[part], left[part]) for part in self._parts]
        return StoreRequest(ids[own], epochs[own], chosen.rows(own), crops)


class EvalChain(ResidentChain):
    """The batches of an evaluation: whole squares, without the samples left out. `ids`: the sample of each row of the store."""

    def __init__(self, evaluation: Evaluation, store: Store, ids: Ids) -> None:
        super().__init__(evaluation.context, store, Filler(evaluation.context, store, ids, evaluation.batch, evaluation.policy,
                                                           evaluation.skipped, complete=False), evaluation.mean_image)
        self._evaluation = evaluation

    def rows(self, step: int) -> Rows:
        return self.filler.rows(self._evaluation.samples(step))

    def request(self, step: int) -> StoreRequest:
        ids, rows = self._evaluation.samples(step), self.rows(step)
        self.filler.fill(rows)
        kept = self.store.stored[rows] != 0
        corner = np.zeros(np.count_nonzero(kept), np.int64)
        unchanged = Augmentation.none(len(corner), self._evaluation.channel_mean)
        return StoreRequest(ids[kept], corner, unchanged, [(rows[kept], corner, corner)])


def _store(context: LoaderContext, layout: Layout, ids: Ids, group: dist.ProcessGroup | None = None) -> Store:
    """The store that `machine.resident_memory` asks for; one in GPUs holds samples `ids` only."""
    if context.machine.resident_memory == "gpu":
        return GpuStore(len(ids), layout, context.device, group)
    folder = Path(context.machine.resident_folder or context.index.path / "resident")
    return RamStore(folder, context.split, context.index.split_sha256(context.split), len(context.ids), layout,
                    device=context.device, decoder=context.decoding(ids[:1], 1, layout.square_px).by_sample().decoder,
                    threads=context.threads)


def train_chain(context: LoaderContext, kind: str, sampler: Sampler, planner: CropPlanner, stand_ins: StandIns,
                mean_image: npt.NDArray[np.float32] | None, group: dist.ProcessGroup | None) -> TrainChain:
    """The chain of tier resident for training; `kind`: ``rgb`` or ``yuv420``. Corrupt samples are tried again by the next
    process. `machine.resident_memory`:

    - ``ram``: a file in `machine.resident_folder` that all processes of a node map, see `RamStore`. It outlives them.
    - ``gpu``: spread over the processes of `group`, see `GpuStore`; in `device_id`'s memory, or else the processes'. The group
      is the node's, for this loader alone; all of it must take the same batches. None: there is one process.

    Raises ValueError when `data.region` is not the square, or for another kind; RuntimeError when the squares do not fit (the
    message names what would), or the folder cannot be written."""
    data = context.data
    if data.region != "square":
        raise ValueError(f"data.region (={data.region}) must be square for tier resident, which keeps central squares only; "
                         "set data.region: square, or use data.tier: archives or packed")
    crop_px = data.square_px if data.resized_boxes else data.crop_px  # boxes are taken of whole squares
    store = _store(context, Layout(kind, data.square_px, crop_px), context.ids, group)
    return TrainChain(context, store, sampler, planner, stand_ins, mean_image)


def eval_chain(evaluation: Evaluation, kind: str, keep: bool) -> Chain:
    """The chain of tier resident for evaluation; `kind`: ``rgb`` or ``yuv420``. `machine.resident_memory`:

    - ``ram``: a file of the split, as for training: of all processes of a node, which fill it together; later runs read it.
    - ``gpu``: in `device_id`'s memory (or else the process's), the squares of this process's own batches, which are the same in
      every pass, so that none has to be exchanged; they end with the loader.

    Without `keep` (a split that is evaluated once) every pass decodes, and nothing is stored; the images are the same. Raises as
    `train_chain`, and ValueError for samples that are not of the split."""
    context, side = evaluation.context, evaluation.context.data.square_px
    layout = Layout(kind, side, side)  # a "crop" is the whole square here
    if not np.isin(evaluation.ids, context.ids).all():
        raise ValueError(f"ids (={len(evaluation.ids)} samples) must be of split {context.split}, whose images are kept; leave "
                         "out the others")
    if not keep:
        return evaluation.decoding_chain(None if kind == "rgb" else layout.restored)
    ids = context.ids
    if context.machine.resident_memory == "gpu":
        ids = np.unique(np.concatenate([ids[:0], *map(evaluation.samples, evaluation.steps)]))
    try:
        return EvalChain(evaluation, _store(context, layout, ids), ids)
    except RuntimeError as error:
        raise RuntimeError(f"split {context.split}, whose squares tests keep in memory: {error}") from error
