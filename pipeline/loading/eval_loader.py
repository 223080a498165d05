"""The evaluation loader: central squares, every sample once; centre crop, or the 10 crops of a test (paper §4.1).

B samples of a batch, S side of the central square, crop the side the network sees."""
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import Chain, DecodingChain, Loader
from pipeline.monitor import Monitor
from pipeline.reading.quarantine import Policy, Skip, refuse
from pipeline.reading.source import ArchiveSource
from pipeline.sampling.batch_plan import BatchPlan, plan_squares
from pipeline.sampling.sampler import Ids
from pipeline.stats import Stats, channel_mean, mean_image


class Evaluation:
    """What a pass of an evaluation is: which samples come in which batch, what is subtracted, what happens to corrupt ones.

    `batch`: global, over all ranks. `stats`: what to subtract; None gives the pixels as they are, (B, S, S, 3) uint8. `shard`
    (k, n): this rank gets every n-th batch, beginning with the k-th. `skip_corrupt`: leave unreadable samples out, listed in
    `skipped` (id → reason), instead of raising. `ids` (N,): only these samples, in this order, instead of the whole split in id
    order."""

    def __init__(self, context: LoaderContext, batch: int, stats: Stats | None, *, shard: tuple[int, int] = (0, 1),
                 skip_corrupt: bool = False, ids: Ids | None = None) -> None:
        if batch < 1:
            raise ValueError(f"batch_size (={batch}) must be at least 1; raise it")
        self.context, self.batch, self.ids = context, batch, context.ids if ids is None else np.asarray(ids)
        if self.ids.ndim != 1 or self.ids.dtype.kind not in "iu" or np.any((self.ids < 0) | (self.ids >= len(context.index))):
            raise ValueError(f"ids (={ids}) must be whole numbers from 0 to {len(context.index) - 1}; give some of the index's")
        self.steps = range(shard[0], -(-len(self.ids) // batch), shard[1])
        self.raw, skip, data = stats is None, Skip(), context.data
        self.skipped = skip.skipped
        self.policy: Policy = skip if skip_corrupt else refuse
        stats = None if stats is None else stats.expect(data.square_px)
        self.mean_image = None if stats is None else mean_image(data, stats)
        self.channel_mean = None if stats is None else channel_mean(data, stats)
        self.central_mean: npt.NDArray[np.float32] | None = None
        if self.mean_image is not None and data.mean == "image_center":
            low = (data.square_px - data.crop_px) // 2
            self.central_mean = self.mean_image[:, low:low + data.crop_px, low:low + data.crop_px]
            self.mean_image = None

    def samples(self, step: int) -> Ids:
        return self.ids[step * self.batch:(step + 1) * self.batch]

    def plan(self, step: int) -> BatchPlan:
        return plan_squares(self.context.index, self.context.data.square_px, step, self.samples(step), self.channel_mean)

    def decoding_chain(self, convert: Callable[[torch.Tensor], torch.Tensor] | None = None) -> DecodingChain:
        """The chain that reads the index and decodes, whatever the tier of the training. `convert`: see `DecodingChain`."""
        context = self.context
        settings = context.decoding(self.ids, self.batch, context.data.square_px).by_sample()
        return DecodingChain(context, self.plan, ArchiveSource(context.index, check_crc=context.machine.check_crc), self.policy,
                             settings, self.mean_image, raw=self.raw, convert=convert)


class EvalLoader(Loader):
    """Every sample of a split exactly once, in id order, as its central square; the last batch may be shorter. Raises
    SampleError for an unreadable one: an evaluation counts every image, so there is no stand-in."""

    def __init__(self, evaluation: Evaluation, chain: Chain, return_batch: bool = True) -> None:
        super().__init__(evaluation.context, chain, return_batch)
        self._evaluation, self.skipped, mean = evaluation, evaluation.skipped, evaluation.central_mean
        self._memory_format = torch.channels_last if evaluation.context.machine.channels_last else torch.contiguous_format
        self._central_mean = None if mean is None else torch.from_numpy(mean).to(self.device)

    def __len__(self) -> int:
        """Batches of this process; the last one of the split may be shorter."""
        return len(self._evaluation.steps)

    def __iter__(self) -> Iterator[Any]:
        self.check_process()
        self.close()
        prefetcher = self._start(self._evaluation.steps)
        try:
            for number in itertools.count():
                try:
                    batch = self.take(prefetcher, number)
                except StopIteration:
                    return
                yield batch if self.return_batch else (next(self.crops(batch.images, 1)).contiguous(
                    memory_format=self._memory_format), batch.labels)
                del batch
        finally:
            prefetcher.close()
            if self._prefetcher is prefetcher:
                self._prefetcher = None

    def crops(self, images: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The `crops` of a batch's images (B, 3, S, S), what they subtract included."""
        for crop in crops(images, self.data.crop_px, count):
            yield crop if self._central_mean is None else (crop - self._central_mean).to(crop.dtype)


def crops(images: torch.Tensor, crop_px: int, count: int) -> Iterator[torch.Tensor]:
    """Crops of squares (B, 3, S, S) for evaluation, lazily: (B, 3, crop, crop) each, views where not flipped. `count`: 1, the
    centre; or 10, the four corners and the centre, then all of them flipped (paper §4.1); else ValueError."""
    if count not in (1, 10):
        raise ValueError(f"views (={count}) must be 1 (centre) or 10 (paper §4.1); give one of them")
    far, middle = images.shape[-1] - crop_px, (images.shape[-1] - crop_px) // 2
    places = [(middle, middle)] if count == 1 else [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    for mirror in (False,) if count == 1 else (False, True):
        for top, left in places:
            crop = images[..., top:top + crop_px, left:left + crop_px]
            yield crop.flip(-1) if mirror else crop


def square_loader(index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats | None, *,
                  machine: LoaderConfig = LoaderConfig(), device_id: int | None = None, skip_corrupt: bool = False,
                  ids: Ids | None = None) -> EvalLoader:
    """An `EvalLoader` that reads the index and decodes, whatever the tier of the training. For the arguments see `LoaderContext`
    and `Evaluation`."""
    context = LoaderContext(index, split, data, machine, device_id, Monitor())
    evaluation = Evaluation(context, batch, stats, skip_corrupt=skip_corrupt, ids=ids)
    return EvalLoader(evaluation, evaluation.decoding_chain())
