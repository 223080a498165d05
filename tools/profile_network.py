"""How many images a second the network of a recipe takes: forward, backward and update, on batches that cost nothing.

The one concept: the step is the training loop's own (train/loop.py) without the loader: the same network, update rule,
precision and check of the gradient, on the recipe's device; the pixels are noise. B batch.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional
from torch.nn.utils import get_total_norm

from pipeline.batches import Batch
from train import build
from train.config import Config
from train.distributed import Topology
from train.optimizer import build_optimizer


class NetworkStep:
    """The network, stepped. Called with a batch it makes one step and returns when the device is done with it."""

    def __init__(self, config: Config, where: Topology) -> None:
        build.settle(config, where)
        self._config, self._where = config, where
        self._network = build.network(config, where)
        self._network.train()
        self._optimizer = build_optimizer(self._network, config.optimizer)
        self._autocast = build.autocast(config, where)
        self._step = 0

    def __call__(self, batch: Batch) -> None:
        """A step on a loader's batch."""
        self._train(batch.images, batch.labels)

    def synthetic(self, batch: int) -> Iterator[int]:
        """Steps on the same B images of noise, without end; each gives B."""
        side, classes = self._config.data.crop_px, self._config.model.classes
        random = torch.Generator().manual_seed(0)
        images = torch.randn(batch, 3, side, side, generator=random).to(self._where.device) * 50
        labels = torch.randint(classes, (batch,), generator=random).to(self._where.device)
        while True:
            self._train(images, labels)
            yield batch

    def _train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with self._autocast():
            logits = self._network(images, step=self._step)
        loss = functional.cross_entropy(logits, labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = get_total_norm([p.grad for p in self._network.parameters() if p.grad is not None])
        torch.stack([loss.detach(), norm]).tolist()     # the loop looks at both, which waits for the device
        self._optimizer.step()
        int((logits.detach().argmax(1) != labels).sum())
        self._step += 1
