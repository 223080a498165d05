"""One training step: forward, loss, backward, gradient all-reduce, check for NaN and infinity, optimizer update.

The host begins steps and reads their results later (train/results.py). So the step is a function of tensors on the device alone:
images, labels, and some numbers of the host's, such as the learning rates. A result that is not finite freezes the weights there:
when the host reads it, they are still those of the last good step.
"""
from typing import Callable, Iterator

import torch
from torch.nn import functional

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.optimizer import Schedule, build_optimizer, set_lr
from train.parallel.failure import enter_phase
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology
from train.results import Flags, ResultRing, StepResult

SYNC_STEPS = 4  # by default, on a GPU


class TrainStep:
    """The network, its optimizer and learning rate schedule, and the step that updates them."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.network = build.network(config, topology)
        self.schedule = Schedule(config.schedule, config.optimizer, config.train.batch)
        self.optimizer = build_optimizer(self.network, config.optimizer, self.schedule.layers, topology.group("tower"))
        self.autocast = build.autocast(config, topology)
        self._config, self._topology = config, topology
        if config.machine.step == "captured" and not (topology.is_single and topology.device.type == "cuda"):
            raise ValueError(f"machine.step (=captured) needs a single process with a GPU, not {topology.world_size} on "
                             f"{topology.device.type}; use auto")
        self._gradients = GradientReducer(self.network, topology, config.parallel.overlap)
        self._ring = ResultRing(config.machine.sync_steps or (SYNC_STEPS if topology.device.type == "cuda" else 1), topology)

    def __call__(self, batch: Batch, epoch: int, flags: Callable[[], Flags] = Flags) -> None:
        """Begin to update the network by this process's rows of a global batch. All processes call it together. `flags` is called
        after the backward pass; what it gives travels with the sums of loss and errors, and costs no communication of its own."""
        lr = self.schedule.lr(batch.step, epoch)
        set_lr(self.optimizer, lr, self.schedule.layer_rates(epoch))
        numbers = self._topology.upload([*self.optimizer.rates(), batch.step % self._ring.steps])
        self._compute(batch, numbers, flags)
        self._ring.begun(batch.step, lr, flags())

    def results(self, wait: bool = True) -> Iterator[list[StepResult]]:
        """Results not given before, in lists of those that were read together: of all steps begun (`wait`), or of those that can
        be had without keeping the device waiting. Raises NotFinite in place of the first that is not finite, in all processes,
        naming step and learning rate."""
        return self._ring.read(wait)

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
        """Weights and velocities as a checkpoint holds them, and their canonical shapes."""
        return build.parameters(self.network, self._config, self.optimizer)

    def _compute(self, batch: Batch, numbers: torch.Tensor, flags: Callable[[], Flags]) -> None:
        """The step, on the device. `numbers`: `PaperSGD.rates` and the row of the ring."""
        self._ring.write(numbers[-1], self._forward_backward(batch), flags)
        enter_phase("update", batch.step)
        self.optimizer.step(numbers[:-1], self._ring.frozen)

    def _forward_backward(self, batch: Batch) -> torch.Tensor:
        """Compute the gradients of the global batch's mean loss, in micro-batches. Returns (3,): this process's share of the mean
        loss, how many of its images are misclassified, the norm of its gradient."""
        pieces, size, device = self._config.parallel.accumulate, self._config.train.batch, self._topology.device
        row = self._topology.data_rank * len(batch.labels)  # of the global batch
        loss, errors = torch.zeros((), device=device), torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for piece, (images, labels) in enumerate(zip(batch.images.tensor_split(pieces), batch.labels.tensor_split(pieces))):
            enter_phase("forward", batch.step)
            with self.autocast():
                logits = self.network(images, step=batch.step, rows=(row, size))
            piece_loss = functional.cross_entropy(logits, labels, reduction="sum") / size
            enter_phase("backward", batch.step)
            self._gradients.begin(last=piece == pieces - 1)
            piece_loss.backward()
            row += len(labels)
            loss = loss + piece_loss.detach()
            errors += (logits.detach().argmax(1) != labels).sum()
        return torch.stack([loss, errors, self._gradients.finish()])
