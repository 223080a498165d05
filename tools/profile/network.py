"""The training step of a recipe's network on synthetic batches: how many images/s training takes when data costs nothing."""
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.parallel.topology import Topology
from train.step import TrainStep


class NetworkStep:
    """The training loop's own step, on the recipe's device. Called with a batch it returns when the device is done with it;
    without `wait` as the loop does, some steps before."""

    def __init__(self, config: Config, topology: Topology, *, wait: bool = True) -> None:
        build.configure_torch(config, topology)
        self._config, self._topology, self._wait, self._steps = config, topology, wait, itertools.count()
        self._step = TrainStep(config, topology)
        self._step.prepare()

    def __call__(self, batch: Batch) -> None:
        self._step(replace(batch, step=next(self._steps)), 0)
        for _ in self._step.results(self._wait):
            pass

    def synthetic(self) -> Iterator[int]:
        """Steps on the same images of noise, without end; each gives the images of all processes together."""
        side, classes, total = self._config.data.crop_px, self._config.model.classes, self._config.train.batch
        random, share = torch.Generator().manual_seed(0), total // self._topology.data_ranks
        count = share // 2 if self._step.network.halves_images else share
        images = torch.randn(count, 3, side, side, generator=random).to(self._topology.device) * 50
        labels = torch.randint(classes, (share,), generator=random).to(self._topology.device)
        nothing = np.zeros(share, np.int64)
        while True:
            self(Batch(images, labels, nothing, nothing, 0))
            yield total
