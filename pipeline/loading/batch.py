"""What every loader is: batches of samples of an index, made ahead of need (training: `pipeline.loading.train_loader`, tests:
`squares`).

B samples of a batch, S side of the central square, crop the side the network sees.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding import geometry
from pipeline.loading.prefetch import Ahead
from pipeline.decoding.normalize import Colour
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.monitor import Meter
from pipeline.parallel import cores
from pipeline.reading.source import Reader
from pipeline.sampling.sampler import Ids
from pipeline.decoding.decoder import GraphPlan, Prepared, Stream


@dataclass(frozen=True)
class Batch:
    """What a loader gives.

    Attributes:
        images: training (B, 3, crop, crop), tests (B, 3, S, S); float32, mean subtracted, on the loader's device.
        labels: (B,) int64 class indices on the same device; -1 where unknown.
        ids: (B,) int64 sample ids, after any substitution.
        epochs: (B,) int64 epoch of each sample (0 in tests).
        step: number of the batch: counted from the start of training, or of this pass.
    """
    images: torch.Tensor
    labels: torch.Tensor
    ids: Ids
    epochs: Ids
    step: int


class Pairs:
    """(images, labels) of each batch, for loops that expect what a DataLoader gives. Iterating again gives the next epoch.

    Args:
        loader: gives the batches.
        image: what is made of a batch's images.
    """

    def __init__(self, loader: "Loader", image: Callable[[torch.Tensor], torch.Tensor] = lambda images: images) -> None:
        self._loader, self._image = loader, image

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._loader:
            yield self._image(batch.images), batch.labels


def one_ahead(begun: Iterator[Callable[[], Batch]]) -> Generator[Batch, None, None]:
    """The batches that are begun, each waited for only when the next one is begun too, so that threads do not run dry.

    When the next one fails, those before it still come out.
    """
    waiting: Callable[[], Batch] | None = None
    while True:
        try:
            following = next(begun)
        except BaseException as failure:
            if waiting is not None:
                yield waiting()
            if isinstance(failure, StopIteration):
                return
            raise
        if waiting is not None:
            yield waiting()
        waiting = following


class Loader(ABC):
    """What training and tests share: reading, decoding, labels, device.

    On a CPU batches are made in a thread of their own, `machine.queue` of them ahead; on a GPU the device is ahead anyway.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, machine: LoaderConfig, device_id: int | None,
                 meter: Meter | None) -> None:
        if device_id is not None and not torch.cuda.is_available():
            raise ValueError(f"device_id (={device_id}) needs a CUDA device, and torch sees none; leave it out to decode on "
                             "the CPU")
        self.index, self.split, self.data, self.machine = index, split, data, machine
        self.device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._device_id = device_id
        self._ids = index.ids(split)
        if len(self._ids) == 0:
            raise ValueError(f"split (={split}) of {index.path} must have samples; it has none, see build_index.py info")
        self._reader = Reader(index, check_crc=machine.check_crc)
        self.threads = machine.threads or cores()
        self._ahead: Ahead[Batch] | None = None
        self.meter = meter or Meter()

    def _sizes(self, ids: Ids) -> geometry.Pairs:
        rows = self.index.samples[ids]
        return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)

    def _open(self, steps: Iterator[int], batch: int, side_px: int) -> Stream:
        """The stream of the batches `steps`: of at most `batch` samples, (B, side_px, side_px, 3) uint8."""
        self.meter.enter("decode")  # DALI is being started
        return Stream(steps, self._prepare, self._mend, self.plan(batch, side_px), self.meter)

    def plan(self, batch: int, side_px: int) -> GraphPlan:
        """The plan of a graph for batches of at most `batch` samples, (B, side_px, side_px, 3)."""
        sizes = self._sizes(self._ids)
        resample = bool((sizes != geometry.resized(sizes, self.data.square_px)).any())
        return GraphPlan(batch, side_px, resample, self.machine, self.threads, self._device_id)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    def pairs(self) -> Pairs:
        """(images, labels) instead of batches."""
        return Pairs(self)

    @abstractmethod
    def _prepare(self, step: int) -> Prepared:
        """Batch `step` before its pixels; called in reading threads."""

    @abstractmethod
    def _mend(self, prepared: Prepared, row: int, reason: str) -> Prepared:
        """The batch without the sample of `row`, which cannot be decoded; may raise instead."""

    def _colour(self, side_px: int, mean_image: npt.NDArray[np.float32] | None) -> Colour:
        return Colour(side_px, mean_image, threads=self.threads, device=self.device)

    def _collect(self, stream: Stream) -> tuple[Prepared, Sequence[torch.Tensor] | torch.Tensor]:
        """The stream's next batch as `_begun` wants it: rows for a CPU's threads, all of it for a GPU."""
        return stream.rows() if self._device_id is None else stream.collect()

    def _begun(self, colour: Colour, prepared: Prepared,
               pixels: Sequence[torch.Tensor] | torch.Tensor) -> Callable[[], Batch]:
        """Begin to make a batch of its uint8 pixels, B views (3, S, S) or (B, S, S, 3); gives what waits for it."""
        if isinstance(pixels, torch.Tensor):
            whole, finish = pixels.permute(0, 3, 1, 2), prepared.finish
            return lambda: self._finished(prepared, lambda: colour.whole(whole, finish))
        images = colour.begin(pixels, prepared.finish)
        return lambda: self._finished(prepared, images)

    def _finished(self, prepared: Prepared, images: Callable[[], torch.Tensor]) -> Batch:
        self.meter.enter("colour")
        with self.meter.span("colour", prepared.step):
            made = images()
        return self._batch(prepared.step, prepared.ids, prepared.epochs, made)

    def _batch(self, step: int, ids: Ids, epochs: Ids, images: torch.Tensor) -> Batch:
        self.meter.enter("copy")
        with self.meter.span("copy", step):
            return Batch(images, self.labels(ids), ids, epochs, step)

    def labels(self, ids: Ids) -> torch.Tensor:
        """(B,) int64 class indices of samples, on the loader's device."""
        return torch.from_numpy(self.index.samples["label"][ids].astype(np.int64)).to(self.device)

    def _start(self, produce: Generator[Batch, None, None]) -> Ahead[Batch]:
        return Ahead(produce, self.machine.queue if self._device_id is None else 0, self.meter)

    def _next(self, ahead: Ahead[Batch], step: int) -> Batch:
        with self.meter.waiting(step, None if self._device_id is None else torch.cuda.current_stream(self._device_id)):
            return next(ahead)

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
