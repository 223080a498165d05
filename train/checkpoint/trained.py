"""A trained network, opened to be looked at: which checkpoint, its images as it sees them, its features, its classes in words.

In one process, which holds all of the network. (Tests that count are train/evaluate/__main__.py.)
B images of a batch, S side of the central square, c side of the crop, D neurons of the last hidden layer, K classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence

if TYPE_CHECKING:  # `chosen` and `word` need none of it
    import numpy as np
    import torch

    from model.alexnet import AlexNet
    from pipeline.index.sample_index import ClassInfo, SampleIndex
    from pipeline.loading.eval_loader import TestLoader
    from pipeline.stats import Stats
    from train.config import Config
    from train.parallel.topology import Topology


def word(classes: Sequence[ClassInfo], label: int) -> str:
    """The first of a class's words; without words its wnid; "?" for no label, a number for a class that the index lacks."""
    if label < 0:
        return "?"
    if label >= len(classes):
        return f"class {label}"
    return classes[label].words.split(",")[0].strip() or classes[label].wnid


def chosen(run: Path | None, checkpoint: Path | None, which: str | None) -> Path:
    """The checkpoint that was asked for, compared with its manifest.

    Args:
        run: a run folder; or
        checkpoint: a checkpoint folder.
        which: of a run's checkpoints, "best" or (None too) "last", the newest that is whole.

    Raises:
        ValueError: there is none.
        DamagedCheckpoint: its files are not the ones that were written.
    """
    from train.checkpoint import checkpoint as checkpoints

    if checkpoint is not None and which is not None:
        raise ValueError(f"--which (={which}) chooses among a run's checkpoints; leave it out, or give --run")
    folder = run / "checkpoints" if run is not None else checkpoint
    if folder is None or not folder.is_dir():
        raise ValueError(f"checkpoint folder (={folder}) does not exist; give a run folder with --run or a checkpoint of it with "
                         "--checkpoint")
    if checkpoint is None:
        found = checkpoints.best(folder) if which == "best" else checkpoints.newest_good(
            folder, lambda message: print(f"warning: {message}", file=sys.stderr))
        if found is None:
            raise ValueError(f"run (={run}) has no {'validated ' if which == 'best' else ''}checkpoint yet; wait for its first, "
                             "or give another")
        folder = found
    if (folder / "model.safetensors").is_file():
        raise ValueError(f"checkpoint (={folder}) is a network that train.export wrote; give the checkpoint it was made of")
    checkpoints.verify(folder)
    return folder


def identity(checkpoint: Path) -> str:
    """SHA-256 (hex) of a checkpoint: of its manifest, which has those of all of its files."""
    from train.checkpoint.checkpoint import MANIFEST

    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Trained:
    """A network with the weights of a checkpoint, in eval mode, and the data set that it is shown.

    Attributes:
        path: of the checkpoint.
        config: of its run, with the index and the machine that were asked for.
        index: of the images.
        stats: what is subtracted from them.
        network: all of it.
        where: this process.
    """

    path: Path
    config: Config
    index: SampleIndex
    stats: Stats
    network: AlexNet
    where: Topology

    @property
    def layer(self) -> str:
        """Name of the layer before the last, whose activation the features are: fc7 in the paper."""
        return [*self.config.model.convs, *self.config.model.fulls][-2]

    def loader(self, index: SampleIndex, split: str, ids: np.ndarray | None = None, *, pixels: bool = False,
               skip_corrupt: bool = False) -> TestLoader:
        """Images of a split in id order, or `ids` in theirs. `pixels`: as they are, (B, S, S, 3) uint8, nothing subtracted.

        `skip_corrupt`: leave unreadable ones out, instead of raising SampleError.
        """
        from pipeline.loading.eval_loader import TestLoader
        from train.build import loader_config

        device = self.where.device
        return TestLoader(index, split, self.config.data.pixels(), self.config.machine.test_batch, None if pixels else self.stats,
                          machine=loader_config(self.config, self.where), ids=ids, skip_corrupt=skip_corrupt,
                          device_id=device.index if device.type == "cuda" else None)

    def crops(self, loader: TestLoader) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(ids (B,), centre crops (B, c, c, 3) uint8) of each batch of a loader of `pixels`."""
        px = self.config.data.crop_px
        low = (self.config.data.square_px - px) // 2
        for batch in loader:
            yield batch.ids, batch.images[:, low:low + px, low:low + px].clone()  # the squares' memory is free for the next

    def features(self, loader: TestLoader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids (B,), features (B, D) float32) of each batch, of the centre crops.

        Computed in float32 whatever the run's precision: bfloat16 gives one query in 15 other neighbours (of 50,000 images).

        Raises:
            RuntimeError: a feature is not finite.
        """
        import torch

        for batch in loader:
            with torch.no_grad():
                found = self.network.features(next(loader.views(batch.images, 1)).contiguous()).float()
            if not torch.isfinite(found).all():
                raise RuntimeError(f"features (=NaN or infinite) of {self.path} must be finite; its weights are damaged, give an "
                                   "earlier checkpoint")
            yield batch.ids, found.cpu().numpy()


@contextlib.contextmanager
def opened(path: Path, *, index: str | Path | None = None, archives: str | Path | None = None, device: str | None = None,
           batch: int | None = None) -> Iterator[Trained]:
    """The network of a checkpoint that `chosen` gave, until the end of the `with`.

    Args:
        index: of the images (default: the run's).
        archives: folder to look for them in (default: the run's).
        device: auto, cpu or cuda (default: the run's).
        batch: images at once (default: the run's).

    Raises:
        ValueError: the index has other classes than the network; started as several processes.
    """
    from pipeline.stats import Stats
    from train import build
    from train.checkpoint import checkpoint
    from train.config import ParallelConfig
    from train.parallel.topology import topology
    from train.recipe import load

    config = load(path / checkpoint.CONFIG)
    said: dict[str, Any] = {"archives": None if archives is None else str(archives), "device": device, "test_batch": batch}
    machine = replace(config.machine, **{name: value for name, value in said.items() if value is not None})
    config = replace(config, machine=machine, parallel=ParallelConfig(towers=1),
                     data=replace(config.data, index=str(index or config.data.images), packed=""))
    with topology(towers=config.model.towers, parallel=config.parallel, device=machine.device, timeout_s=machine.timeout_s,
                  silence_s=machine.silence_s) as where:
        if not where.is_alone:
            raise ValueError(f"processes (={where.ranks}) must be one; start it without torchrun")
        build.settle(config, where)
        found = build.index(config)
        if build.classes_sha256(found) != checkpoint.read_state(path)["classes"]:
            raise ValueError(f"index (={config.data.index}) has other classes, or another order of them, than the one the "
                             "network was trained on; give an index of the same classes")
        network = build.network(config, where)
        tensors, shapes = build.parameters(network, config)
        checkpoint.load(path, tensors, shapes, where, all_of_it=False)
        yield Trained(path, config, found, Stats.load(path / checkpoint.STATS), network.eval(), where)
