"""How many images a second the network of a recipe takes: forward, backward and update, on batches that cost nothing.

The one concept: the step is the training loop's own (train/loop.py) without the loader: the same network, sums of gradients,
update rule, precision and check of what is not finite, on the recipe's device and for any number of processes; the pixels are
noise. B batch, over all processes.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.parallel.topology import Topology
from train.parallel.gradients import Gradients
from train.optimizer import build_optimizer


class NetworkStep:
    """The network, stepped. Called with a batch it makes one step and returns when the device is done with it."""

    def __init__(self, config: Config, where: Topology) -> None:
        build.settle(config, where)
        self._config, self._where = config, where
        self._network = build.network(config, where)
        self._network.train()
        self._gradients = Gradients(self._network, where, config.parallel.overlap)
        self._optimizer = build_optimizer(self._network, config.optimizer, towers=where.group("tower"))
        self._autocast = build.autocast(config, where)
        self._step = 0

    def __call__(self, batch: Batch) -> None:
        """A step on a loader's batch."""
        self._train(batch.images, batch.labels)

    def synthetic(self, batch: int) -> Iterator[int]:
        """Steps on the same B images of noise, without end; each gives B."""
        side, classes = self._config.data.crop_px, self._config.model.classes
        random = torch.Generator().manual_seed(0)
        share = batch // self._where.data_ranks
        mine = share // 2 if self._network.halves_images else share
        images = torch.randn(mine, 3, side, side, generator=random).to(self._where.device) * 50
        labels = torch.randint(classes, (share,), generator=random).to(self._where.device)
        while True:
            self._train(images, labels)
            yield batch

    def _train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Images of this process; labels of its pair's share of the batch."""
        total = len(labels) * self._where.data_ranks
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._network(images, step=self._step, rows=(self._where.data_rank * len(labels), total))
        loss = functional.cross_entropy(logits, labels, reduction="sum") / total
        self._gradients.begin(last=True)
        loss.backward()
        norm = self._gradients.finish()
        wrong = (logits.detach().argmax(1) != labels).sum()
        # The loop looks at all of them, which waits for the device and for the other processes.
        self._where.total(torch.stack([loss.detach(), norm, wrong]).tolist())
        self._optimizer.step()
        self._step += 1
