"""`Batch`, what a loader gives (images NCHW), and `LoaderContext`, what its stages share. B samples, S side of a square."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.decoding.graph import DecodeSettings
from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.decoding.transfer import to_device
from pipeline.index.sample_index import SampleIndex
from pipeline.monitor import Monitor
from pipeline.process_pool import cores
from pipeline.sampling.sampler import Ids


@dataclass(frozen=True)
class Batch:
    # Training (B, 3, crop, crop), evaluation (B, 3, S, S); RGB, mean subtracted, of type `data.output`, on the loader's device.
    # In memory it lies plane by plane, or as `machine.channels_last` says.
    images: torch.Tensor
    labels: torch.Tensor  # (B,) int64 class indices on the same device; -1 where unknown
    ids: Ids  # (B,) int64 sample ids, after any stand-in took a corrupt sample's place
    epochs: Ids  # (B,) int64 epoch of each sample (0 in evaluation)
    step: int  # number of the batch: counted from the start of training, or of this pass
    index: SampleIndex | None = field(default=None, repr=False)  # what the ids are of; None: synthetic

    @property
    def paths(self) -> list[str]:
        """(B,) where each image lies: archive and name in it; read from the archives, when asked for."""
        assert self.index is not None
        return [self.index.location(id) for id in self.ids.tolist()]


@dataclass(frozen=True)
class LoaderContext:
    """What all stages of a loader share: the samples, settings, the device and the monitor. Raises ValueError when there is no
    such GPU, or the split is empty."""
    index: SampleIndex
    split: str
    data: DataConfig
    machine: LoaderConfig
    device_id: int | None  # GPU that decodes and holds the batches, or None for the CPU
    monitor: Monitor

    def __post_init__(self) -> None:
        if self.device_id is not None and not torch.cuda.is_available():
            raise ValueError(f"device_id (={self.device_id}) needs a CUDA device, and torch sees none; leave it out to decode on "
                             "the CPU")
        if len(self.ids) == 0:
            raise ValueError(f"split (={self.split}) of {self.index.path} has no samples; see alexnet index info")

    @cached_property
    def ids(self) -> Ids:
        """(N,) samples of the split, ascending."""
        return self.index.ids(self.split)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_id is None else torch.device("cuda", self.device_id)

    @cached_property
    def threads(self) -> int:
        """Threads that decode, and on a CPU normalize."""
        return self.machine.threads or cores()

    def decoding(self, ids: Ids, batch: int, side_px: int, *, boxed: bool = False) -> DecodeSettings:
        """How samples `ids` are decoded, at most `batch` at a time, to a side of `side_px`; `boxed`: of boxes."""
        sizes = geometry.sizes(self.index, ids)
        resample = boxed or bool((sizes != geometry.resized(sizes, self.data.square_px)).any())
        return DecodeSettings(batch, side_px, resample, self.machine, self.threads, self.device_id, boxed=boxed)

    def finish(self, mean_image: npt.NDArray[np.float32] | None) -> Finish:
        return Finish(mean_image, self.data.mean == "image_center", self.machine.channels_last, self.data.factor,
                      self.data.output)

    def normalizer(self, side_px: int, mean_image: npt.NDArray[np.float32] | None) -> Normalizer:
        return Normalizer(side_px, self.finish(mean_image), threads=self.threads, device=self.device)

    def labels(self, ids: Ids) -> torch.Tensor:
        """(B,) int64 class indices of samples, on the loader's device."""
        return to_device(self.device, self.index.samples["label"][ids].astype(np.int64))[0]

    def batch(self, step: int, ids: Ids, epochs: Ids, images: torch.Tensor) -> Batch:
        """The stage "copy": labels go to the device."""
        self.monitor.enter("copy")
        with self.monitor.span("copy", step):
            return Batch(images, self.labels(ids), ids, epochs, step, self.index)

    def normalized(self, step: int, ids: Ids, epochs: Ids, end: Callable[[], torch.Tensor]) -> Batch:
        """The batch of images that `end` waits for: the stage "normalize", then "copy"."""
        self.monitor.enter("normalize")
        with self.monitor.span("normalize", step):
            images = end()
        return self.batch(step, ids, epochs, images)
