"""Load a trained network and the images it is shown, for figures and features. One process, which holds all of the network.

B images of a batch, S side of the resized image, c side of the crop, D neurons of the last hidden layer.
"""
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Sequence

import numpy as np
import torch

from model.alexnet import AlexNet
from pipeline.index.sample_index import ClassInfo, SampleIndex
from pipeline.loading.eval_loader import EvalLoader, square_loader
from pipeline.stats import Stats
from train import build
from train.checkpoint.resolve import Resolved
from train.config import Config
from train.parallel.topology import Topology, process_group


def class_name(classes: Sequence[ClassInfo], label: int) -> str:
    """The first of a class's words; without words its wnid; "?" for no label, a number for a class that the index lacks."""
    if label < 0:
        return "?"
    if label >= len(classes):
        return f"class {label}"
    return classes[label].words.split(",")[0].strip() or classes[label].wnid


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the weights of a checkpoint, in eval mode, and the data set that it is shown."""
    source: Resolved
    config: Config  # of its run, with the index and machine settings given to `load_trained`
    index: SampleIndex
    stats: Stats  # whose mean is subtracted
    network: AlexNet
    topology: Topology

    @property
    def layer(self) -> str:
        """Name of the layer before the last, whose activation the features are: fc7 in the paper."""
        return [*self.config.model.convs, *self.config.model.fulls][-2]

    def loader(self, index: SampleIndex, split: str, ids: np.ndarray | None = None, *, pixels: bool = False,
               skip_corrupt: bool = False) -> EvalLoader:
        """Loader of a split in id order, or of `ids` in theirs; with `pixels` of the resized images themselves, (B, S, S, 3)
        uint8, without subtracting the mean. `skip_corrupt` leaves unreadable images out instead of raising SampleError."""
        device = self.topology.device
        return square_loader(index, split, self.config.data.pixels(), self.config.machine.test_batch,
                             None if pixels else self.stats, machine=build.loader_config(self.config, self.topology), ids=ids,
                             skip_corrupt=skip_corrupt, device_id=device.index if device.type == "cuda" else None)

    def crops(self, loader: EvalLoader) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(ids (B,), centre crops (B, c, c, 3) uint8) of each batch of a loader with `pixels`."""
        px = self.config.data.crop_px
        low = (self.config.data.square_px - px) // 2
        for batch in loader:
            yield batch.ids, batch.images[:, low:low + px, low:low + px].clone()  # the batch's memory is reused

    def features(self, loader: EvalLoader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (B,), features (B, D) float32) of each batch, of the centre crops. Computed in float32 whatever the run's
        precision: bfloat16 gives one query in 15 other neighbours of 50,000 images. Raises RuntimeError when not finite."""
        for batch in loader:
            with torch.no_grad():
                features = self.network.features(next(loader.crops(batch.images, 1)).contiguous()).float()
            if not torch.isfinite(features).all():
                raise RuntimeError(f"features (=NaN or infinite) of {self.source.path} must be finite; its weights are damaged, "
                                   "give an earlier checkpoint")
            yield batch.ids, features.cpu().numpy()


@contextlib.contextmanager
def load_trained(source: Resolved, *, index: str | Path | None = None, archives: str | Path | None = None,
                 device: Optional[str] = None, batch: Optional[int] = None) -> Iterator[TrainedNetwork]:
    """Load the network of a checkpoint, configured as in `Resolved.inference_config`; the process's device and group are released
    at the end of the `with`. Raises ValueError when the index has other classes, or there are several processes."""
    config = source.inference_config(index, archives, device, batch)
    machine = config.machine
    with process_group(towers=config.model.towers, parallel=config.parallel, device=machine.device, timeout_s=machine.timeout_s,
                       silence_s=machine.silence_s) as process:
        if not process.is_single:
            raise ValueError(f"processes (={process.world_size}) must be one; start it without torchrun")
        build.configure_torch(config, process)
        images = build.index(config)
        source.check_classes(images)
        network = build.network(config, process)
        source.load_weights(network, config, process)
        yield TrainedNetwork(source, config, images, source.stats(), network.eval(), process)
