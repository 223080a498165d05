"""`Batch`, what a loader gives; and what the loaders for training and for evaluation share.

B samples of a batch, S side of the central square, crop the side the network sees.
"""
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.decoding.dali import GraphSettings
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.prefetch import Prefetcher
from pipeline.monitor import Monitor
from pipeline.parallel import cores
from pipeline.sampling.sampler import Ids


@dataclass(frozen=True)
class Batch:
    """What a loader gives.

    Attributes:
        images: training (B, 3, crop, crop), evaluation (B, 3, S, S); float32, mean subtracted, on the loader's device.
        labels: (B,) int64 class indices on the same device; -1 where unknown.
        ids: (B,) int64 sample ids, after any stand-in took a corrupt sample's place.
        epochs: (B,) int64 epoch of each sample (0 in evaluation).
        step: number of the batch: counted from the start of training, or of this pass.
    """
    images: torch.Tensor
    labels: torch.Tensor
    ids: Ids
    epochs: Ids
    step: int


@dataclass(frozen=True)
class LoaderContext:
    """What all stages of a loader share.

    Attributes:
        index, split: the samples.
        data: how an image becomes a crop.
        machine: threads and checks.
        device_id: GPU that decodes and holds the batches, or None for the CPU.
        monitor: measures the stages.

    Raises:
        ValueError: no such GPU, or the split is empty.
    """
    index: SampleIndex
    split: str
    data: DataConfig
    machine: LoaderConfig
    device_id: int | None
    monitor: Monitor

    def __post_init__(self) -> None:
        if self.device_id is not None and not torch.cuda.is_available():
            raise ValueError(f"device_id (={self.device_id}) needs a CUDA device, and torch sees none; leave it out to decode on "
                             "the CPU")
        if len(self.ids) == 0:
            raise ValueError(f"split (={self.split}) of {self.index.path} has no samples; see build_index.py info")

    @cached_property
    def ids(self) -> Ids:
        """(N,) int64 samples of the split, ascending."""
        return self.index.ids(self.split)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_id is None else torch.device("cuda", self.device_id)

    @cached_property
    def threads(self) -> int:
        """Threads that decode, and on a CPU normalize."""
        return self.machine.threads or cores()

    def graph(self, ids: Ids, batch: int, side_px: int) -> GraphSettings:
        """Settings of the graph that decodes samples `ids`, at most `batch` at a time, to a side of `side_px`."""
        sizes = geometry.sizes(self.index, ids)
        resample = bool((sizes != geometry.resized(sizes, self.data.square_px)).any())
        return GraphSettings(batch, side_px, resample, self.machine, self.threads, self.device_id)

    def labels(self, ids: Ids) -> torch.Tensor:
        """(B,) int64 class indices of samples, on the loader's device."""
        return torch.from_numpy(self.index.samples["label"][ids].astype(np.int64)).to(self.device)

    def batch(self, step: int, ids: Ids, epochs: Ids, images: torch.Tensor) -> Batch:
        """The stage "copy": labels go to the device."""
        self.monitor.enter("copy")
        with self.monitor.span("copy", step):
            return Batch(images, self.labels(ids), ids, epochs, step)

    def normalized(self, step: int, ids: Ids, epochs: Ids, end: Callable[[], torch.Tensor]) -> Batch:
        """The batch of images that `end` waits for: the stage "normalize", then "copy"."""
        self.monitor.enter("normalize")
        with self.monitor.span("normalize", step):
            images = end()
        return self.batch(step, ids, epochs, images)


class Chain(Protocol):
    """The stages of a loader, each an iterator over the one before. `pipeline.loading.chain.DecodingChain`, or
    `pipeline.resident.chain.ResidentChain`, whose store takes the place of reading and decoding.

    Attributes:
        stages: names of those that `until` can end after, in order; they are the monitor's.
        queue: finished batches that may wait for the consumer; 0: it makes them itself.
        note: what a person should know before it begins; mostly nothing.
    """
    stages: tuple[str, ...]
    queue: int
    note: str

    def batches(self, steps: range) -> Generator[Batch, None, None]:
        """The batches of these steps, maybe without end; what the stages hold is freed when the generator is closed."""

    def until(self, stage: str, steps: range) -> Generator[object, None, None]:
        """The stages up to and including `stage`, to measure them: they run at once as in `batches`, and what the last one makes
        of each step comes out."""

    @property
    def filled(self) -> tuple[int, int]:
        """(samples that are kept in memory, samples there is room for)."""

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load into memory now what else the first epoch would. `progress`: called with (samples done, samples to do)."""

    def close(self) -> None:
        """Finish what is under way outside of `batches`."""


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


class Loader:
    """What loaders share: their context and chain, and batches made ahead of need.

    On a CPU batches are made in a thread of their own, `machine.queue` of them ahead; on a GPU the device is ahead anyway.
    Close it, or use it in a `with`: its threads and buffers go when it is closed, or with the process, not with the last
    reference.
    """

    def __init__(self, context: LoaderContext, chain: Chain) -> None:
        self.context, self.chain, self.monitor = context, chain, context.monitor
        self.index, self.split, self.data, self.machine = context.index, context.split, context.data, context.machine
        self.device, self.threads, self.labels, self.fill = context.device, context.threads, context.labels, chain.fill
        self._prefetcher: Prefetcher[Batch] | None = None

    @property
    def note(self) -> str:
        """What a person should know before it begins; mostly nothing."""
        return self.chain.note

    @property
    def filled(self) -> tuple[int, int]:
        """(samples that are kept in memory, samples there is room for)."""
        return self.chain.filled

    def pairs(self) -> Pairs:
        """(images, labels) instead of batches."""
        return Pairs(self)

    def _start(self, steps: range) -> Prefetcher[Batch]:
        self._prefetcher = Prefetcher(self.chain.batches(steps), self.chain.queue, self.monitor)
        return self._prefetcher

    def _next(self, prefetcher: Prefetcher[Batch], step: int) -> Batch:
        device = self.device
        with self.monitor.waiting(step, torch.cuda.current_stream(device) if device.type == "cuda" else None):
            return next(prefetcher)

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def close(self) -> None:
        """Free threads and buffers. The loader can be used again; it starts where it was."""
        prefetcher, self._prefetcher = self._prefetcher, None
        if prefetcher is not None:
            prefetcher.close()
        self.chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
