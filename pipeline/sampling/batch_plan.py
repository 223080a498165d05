"""`BatchPlan`: a batch before its pixels exist: samples, crop regions, augmentation and, once read, encoded bytes. B samples
of a batch, S short side of a resized image and side of its central square."""
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.decoding import geometry
from pipeline.index.sample_index import SampleIndex
from pipeline.sampling.augment import Augmentation, Rows, augment, lighting_shift, random_boxes
from pipeline.sampling.sampler import Ids

_BLOCK = 4096  # images that are planned together
Bytes = npt.NDArray[np.uint8]
Encoded = memoryview  # (size,) bytes of an encoded image


@dataclass(frozen=True)
class BatchPlan:
    step: int
    ids: Ids  # (B,)
    epochs: Ids  # (B,)
    origins: Ids  # (B,) the ids before any stand-in took a corrupt sample's place
    attempts: Ids  # (B,) how many stand-ins each row has had
    augmentation: Augmentation
    regions: geometry.Regions  # where to decode and sample each image
    encoded: list[Any] = field(default_factory=list)  # B `Encoded`, once they are read; an error for what could not be

    def rows(self, rows: Rows) -> "BatchPlan":
        return BatchPlan(self.step, self.ids[rows], self.epochs[rows], self.origins[rows], self.attempts[rows],
                         self.augmentation.rows(rows), self.regions.rows(rows),
                         [] if not self.encoded else self.encoded[rows] if isinstance(rows, slice) else
                         [self.encoded[row] for row in rows])

    def without(self, row: int) -> "BatchPlan":
        return self.rows([other for other in range(len(self.ids)) if other != row])


class CropPlanner:
    """Plans training batches: sample ids → random crops or boxes, flips and colour jitter (paper §4.1).

    A crop lies in the central square of the resized image, or (`data.region: full`) anywhere in it. So does a box that is resized
    (`data.crop: random_resized`), but in the whole image *before* it is resized, as torchvision has it. In a square boxes are
    drawn in pixels of the resized one, so that all tiers have the same, and rounded to whole pixels of the image that is read.
    `channel_mean` is subtracted, where there is one. For the eigenvectors see `pipeline.stats.Stats`."""

    def __init__(self, index: SampleIndex, data: DataConfig, seed: int, channel_mean: npt.NDArray[np.float32] | None,
                 eigenvalues: npt.NDArray[np.float64], eigenvectors: npt.NDArray[np.float64]) -> None:
        self._index, self._data, self._seed, self._channel_mean = index, data, seed, channel_mean
        self._eigenvalues, self._eigenvectors = eigenvalues, eigenvectors

    def augmentation(self, ids: Ids, epochs: Ids, extents: geometry.Pairs | None = None) -> Augmentation:
        """The augmentation of samples `ids` in `epochs`, both (B,); the same on every rank and in every thread. `extents` (B, 2)
        of the regions, where they are known already."""
        data, extents = self._data, self._regions(ids)[3] if extents is None else extents
        boxes = random_boxes(self._seed, epochs, ids, extents, data.scale, data.ratio) if data.resized_boxes else None
        rooms = extents - (data.crop_px if boxes is None else boxes[0])
        chosen = augment(self._seed, epochs, ids, rooms, mirror=data.mirror, lighting=data.lighting,
                         lighting_epochs=data.lighting_epochs)
        if boxes is not None:
            box, central = boxes
            top, left = np.where(central, rooms.T // 2, [chosen.top, chosen.left])
            chosen = replace(chosen, top=top, left=left, box=box)
        return self.shifted(chosen)

    def shifted(self, chosen: Augmentation) -> Augmentation:
        """With the shift that belongs to the alphas."""
        shift = lighting_shift(chosen.alphas, self._eigenvalues, self._eigenvectors)
        if self._channel_mean is not None:
            shift -= self._channel_mean
        return replace(chosen, shift=shift)

    def plan(self, step: int, ids: Ids, epochs: Ids, origins: Ids | None = None, attempts: Ids | None = None) -> BatchPlan:
        sizes, resized, first, extents = self._regions(ids)
        chosen, crop_px = self.augmentation(ids, epochs, extents), self._data.crop_px
        offsets = first + np.stack([chosen.top, chosen.left], axis=1)
        regions = (geometry.regions(sizes, resized, offsets, crop_px) if chosen.box is None else
                   geometry.boxes(sizes, resized, offsets, chosen.box, crop_px))
        return BatchPlan(step, ids, epochs, ids if origins is None else origins,
                         np.zeros_like(ids) if attempts is None else attempts, chosen, regions)

    def _regions(self, ids: Ids) -> tuple[geometry.Pairs, geometry.Pairs, geometry.Pairs, geometry.Pairs]:
        """Source sizes, resized sizes, offset of the region in the resized image and its size there, (B, 2) each. Of a whole
        image from which boxes are drawn, resized is not."""
        data, sizes = self._data, geometry.sizes(self._index, ids)
        if data.region == "full":
            resized = sizes if data.resized_boxes else geometry.resized(sizes, data.square_px)
            return sizes, resized, np.zeros_like(resized), resized
        resized = geometry.resized(sizes, data.square_px)
        return sizes, resized, geometry.central(resized, data.square_px), np.full_like(resized, data.square_px)


class BlockPlanner:
    """The plan of a training step, of the `share` ids and epochs that `take` gives for it: those of many steps are drawn
    together, since NumPy's calls cost about the same for 256 images as for thousands (of 6 µs an image 1 is left). Threads may
    ask at the same time."""

    def __init__(self, take: Callable[[int], tuple[Ids, Ids]], share: int, planner: CropPlanner) -> None:
        self._take, self._share, self._planner, self._lock = take, share, planner, threading.Lock()
        self._steps = max(1, _BLOCK // share)
        self._blocks: dict[int, BatchPlan] = {}

    def __call__(self, step: int) -> BatchPlan:
        number, place = divmod(step, self._steps)
        with self._lock:
            block = self._blocks.get(number)
            if block is None:
                taken = [self._take(step) for step in range(number * self._steps, (number + 1) * self._steps)]
                block = self._planner.plan(step, *map(np.concatenate, zip(*taken)))
                self._blocks = {number: block, **{old: kept for old, kept in self._blocks.items() if old == number - 1}}
        plan = block.rows(slice(place * self._share, (place + 1) * self._share))
        # The last bits of a product of matrices may depend on how many rows it has.
        return replace(plan, step=step, augmentation=self._planner.shifted(plan.augmentation))


def plan_squares(index: SampleIndex, square_px: int, step: int, ids: Ids,
                 channel_mean: npt.NDArray[np.float32] | None = None) -> BatchPlan:
    """The plan of a batch of whole central squares, as they are or less a channel mean."""
    sizes, zeros = geometry.sizes(index, ids), np.zeros_like(ids)
    resized = geometry.resized(sizes, square_px)
    regions = geometry.regions(sizes, resized, geometry.central(resized, square_px), square_px)
    return BatchPlan(step, ids, zeros, ids, zeros, Augmentation.none(len(ids), channel_mean), regions)
