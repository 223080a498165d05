"""Test images: every sample of a split once, as its central square, and the views that are cut from it (paper §4.1).

B samples of a batch, S side of the central square, crop the side the network sees.
"""
import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding import geometry
from pipeline.decoding.normalize import Colour, Finish
from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding.dali import Inputs
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch, Loader, Pairs, one_ahead
from pipeline.monitor import Meter
from pipeline.reading.source import Bytes, SampleError
from pipeline.sampling.sampler import Ids
from pipeline.stats import Stats
from pipeline.decoding.decoder import Prepared, Stream


class TestLoader(Loader):
    """Every sample of a split exactly once, in id order, as its central square; the last batch may be shorter.

    Args:
        index, split, data, machine, device_id: as for `TrainLoader`.
        batch: global batch, over all ranks.
        stats: what to subtract; None gives the pixels as they are, (B, S, S, 3) uint8.
        shard: (k, n): this rank gets every n-th batch, beginning with the k-th.
        skip_corrupt: leave unreadable samples out, listed in `skipped`, instead of stopping.
        first: number of the batch to begin with.
        ids: (N,) only these samples, in this order, instead of the whole split in id order.
        meter: as for `TrainLoader`.

    Raises:
        SampleError: a sample is unreadable. A test counts every image, so there is no substitute.
    """
    __test__ = False  # not a test case, whatever its name

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats | None, *,
                 machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1), device_id: int | None = None,
                 skip_corrupt: bool = False, first: int = 0, ids: Ids | None = None,
                 meter: Meter | None = None) -> None:
        super().__init__(index, split, data, machine, device_id, meter)
        if ids is not None:
            self._ids = ids
        if batch < 1:
            raise ValueError(f"batch (={batch}) must be at least 1; correct the recipe")
        self._per_batch, self._skip = batch, skip_corrupt
        self._stats = None if stats is None else stats.expect(data.square_px)
        self._steps = range(first + shard[0], -(-len(self._ids) // batch), shard[1])
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        ahead = self._ahead = self._start(self._produce())
        try:
            for step in itertools.count():
                try:
                    batch = self._next(ahead, step)
                except StopIteration:
                    return
                yield batch
                del batch
        finally:
            ahead.close()
            if self._ahead is ahead:
                self._ahead = None

    def _produce(self) -> Generator[Batch, None, None]:
        side = self.data.square_px
        with contextlib.closing(self._colour(side, self._mean_image())) as colour, \
                contextlib.closing(self._open(iter(self._steps), self._per_batch, side)) as stream:
            yield from one_ahead(self._begin_all(colour, stream))

    def _mean_image(self) -> npt.NDArray[np.float32] | None:
        return self._stats.mean_image_chw if self._stats is not None and self.data.mean == "image" else None

    def _begin_all(self, colour: Colour, stream: Stream) -> Iterator[Callable[[], Batch]]:
        begun: Callable[[], Batch]
        while True:
            try:
                if self._stats is None:
                    prepared, whole = stream.collect()
                    begun = functools.partial(self._batch, prepared.step, prepared.ids, prepared.epochs, whole)
                else:
                    prepared, pixels = self._collect(stream)
                    begun = self._begun(colour, prepared, pixels)
            except StopIteration:
                return
            if len(prepared.ids):  # else all of it was left out
                yield begun

    def pairs(self) -> Pairs:
        """(centre crops, labels) instead of batches."""
        return Pairs(self, lambda images: next(self.views(images, 1)))

    def views(self, images: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """The test views of a batch's squares, one after the other: (B, 3, crop, crop) each.

        Args:
            images: (B, 3, S, S) of a `Batch` of this loader.
            count: 1, the centre; or 10, the four corners and the centre, then their reflections (paper §4.1).
        """
        for view in views(images, self.data.crop_px, count):
            if self._stats is not None and self.data.mean == "image_center":
                low = (self.data.square_px - self.data.crop_px) // 2
                piece = self._stats.mean_image_chw[:, low:low + self.data.crop_px, low:low + self.data.crop_px]
                view = view - torch.from_numpy(piece).to(view.device)
            yield view

    def _ids_of(self, step: int) -> Ids:
        """The samples of batch `step`."""
        return self._ids[step * self._per_batch:(step + 1) * self._per_batch]

    def _wanted(self, step: int) -> Ids:
        """Those of them to be decoded."""
        return self._ids_of(step)

    def _prepare(self, step: int) -> Prepared:
        ids = self._wanted(step)
        self._reader.announce(ids)
        views: list[Bytes] = []
        kept = np.ones(len(ids), bool)
        for row, id in enumerate(ids):
            try:
                views.append(self._reader.read(int(id)))
            except SampleError as error:
                if not self._skip:
                    raise
                self.skipped[int(id)], kept[row] = error.reason, False
        return self._assemble(step, ids[kept], views)

    def _mend(self, prepared: Prepared, row: int, reason: str) -> Prepared:
        id = int(prepared.ids[row])
        if not self._skip:
            raise SampleError(self.index, id, reason)
        self.skipped[id] = reason
        return self._assemble(prepared.step, np.delete(prepared.ids, row),
                              prepared.inputs.encoded[:row] + prepared.inputs.encoded[row + 1:])

    def _assemble(self, step: int, ids: Ids, views: list[Bytes]) -> Prepared:
        sizes = self._sizes(ids)
        resized = geometry.resized(sizes, self.data.square_px)
        offsets = geometry.central(resized, self.data.square_px)
        inputs = Inputs(views, geometry.regions(sizes, resized, offsets, self.data.square_px))
        return Prepared(step, ids, np.zeros_like(ids), inputs, self._finish(len(ids)), ids, np.zeros_like(ids))

    def _finish(self, count: int) -> Finish:
        """What makes images of so many squares."""
        zeros, never = np.zeros(count, np.int64), np.zeros(count, bool)
        shift = np.zeros((count, 3), np.float32)
        if self._stats is not None and self.data.mean == "channel":
            shift -= self._stats.channel_mean
        return Finish(zeros, zeros, never, zeros, zeros, never, shift)


def views(images: torch.Tensor, crop_px: int, count: int) -> Iterator[torch.Tensor]:
    """Crops of squares for testing, lazily: (B, 3, crop, crop) each, views of `images` where not reflected.

    Args:
        images: (B, 3, S, S).
        crop_px: side of a crop, at most S.
        count: 1, the centre; or 10, the four corners and the centre, then their reflections (paper §4.1).

    Raises:
        ValueError: another count.
    """
    if count not in (1, 10):
        raise ValueError(f"views (={count}) must be 1 (centre) or 10 (paper §4.1); correct the recipe")
    far, middle = images.shape[-1] - crop_px, (images.shape[-1] - crop_px) // 2
    places = [(middle, middle)] if count == 1 else [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    for mirror in (False,) if count == 1 else (False, True):
        for top, left in places:
            view = images[..., top:top + crop_px, left:left + crop_px]
            yield view.flip(-1) if mirror else view
