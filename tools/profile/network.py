"""The training step of a recipe's network on synthetic batches: how many images/s training takes when data costs nothing.

The step is the training loop's own (train/loop.py) without the loader: the same network, all-reduce of gradients, update rule,
precision and check of what is not finite, on the recipe's device and for any number of processes. B batch, over all processes.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.optimizer import build_optimizer
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology


class NetworkStep:
    """The network, stepped. Called with a batch it makes one step and returns when the device is done with it."""

    def __init__(self, config: Config, topology: Topology) -> None:
        build.configure_torch(config, topology)
        self._config, self._topology = config, topology
        self._network = build.network(config, topology)
        self._network.train()
        self._gradients = GradientReducer(self._network, topology, config.parallel.overlap)
        self._optimizer = build_optimizer(self._network, config.optimizer, towers=topology.group("tower"))
        self._autocast = build.autocast(config, topology)
        self._step = 0

    def __call__(self, batch: Batch) -> None:
        """A step on a loader's batch."""
        self._train(batch.images, batch.labels)

    def synthetic(self, batch: int) -> Iterator[int]:
        """Steps on the same B images of noise, without end; each gives B."""
        side, classes = self._config.data.crop_px, self._config.model.classes
        random = torch.Generator().manual_seed(0)
        share = batch // self._topology.data_ranks
        images = torch.randn(share // 2 if self._network.halves_images else share, 3, side, side, generator=random)
        images = images.to(self._topology.device) * 50
        labels = torch.randint(classes, (share,), generator=random).to(self._topology.device)
        while True:
            self._train(images, labels)
            yield batch

    def _train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Images of this process; labels of its pair's share of the batch."""
        total = len(labels) * self._topology.data_ranks
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._network(images, step=self._step, rows=(self._topology.data_rank * len(labels), total))
        loss = functional.cross_entropy(logits, labels, reduction="sum") / total
        self._gradients.begin(last=True)
        loss.backward()
        norm = self._gradients.finish()
        wrong = (logits.detach().argmax(1) != labels).sum()
        # The loop looks at all of them, which waits for the device and for the other processes.
        self._topology.all_reduce_sum(torch.stack([loss.detach(), norm, wrong]).tolist())
        self._optimizer.step()
        self._step += 1
