"""One training step: forward, loss, backward, gradient all-reduce, check for NaN and infinity, optimizer update."""
import math
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch.nn import functional

from pipeline.loading.batch import Batch
from train import build
from train.config import Config
from train.exit_codes import NOT_FINITE, CommonError
from train.optimizer import Schedule, build_optimizer, set_lr
from train.parallel.failure import enter_phase
from train.parallel.gradients import GradientReducer
from train.parallel.topology import Topology


class NotFinite(CommonError):
    """The loss or a gradient is NaN or infinite; the update was not made."""
    code = NOT_FINITE


@dataclass(frozen=True)
class StepResult:
    """What a step gave, the same in all processes."""
    lr: float
    loss: float  # mean over the global batch
    errors: int  # misclassified images of the global batch
    flags: list[bool]  # for each flag given to the step, whether it is true in any process


class TrainStep:
    """The network, its optimizer and learning rate schedule, and the step that updates them."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.network = build.network(config, topology)
        self.schedule = Schedule(config.schedule, config.optimizer, config.train.batch)
        self.optimizer = build_optimizer(self.network, config.optimizer, self.schedule.layers, topology.group("tower"))
        self.autocast = build.autocast(config, topology)
        self._config, self._topology = config, topology
        self._gradients = GradientReducer(self.network, topology, config.parallel.overlap)

    def __call__(self, batch: Batch, epoch: int, flags: Callable[[], Sequence[bool]] = tuple) -> StepResult:
        """Update the network by this process's rows of a global batch. All processes call it together. `flags` is called after
        the backward pass; what it gives travels with the sums of loss and errors, and costs no communication of its own. Raises
        NotFinite before the update, in all processes, naming step and learning rate."""
        lr = self.schedule.lr(batch.step, epoch)
        set_lr(self.optimizer, lr, self.schedule.layer_rates(epoch))
        loss, errors, norm = self._forward_backward(batch).tolist()  # waits for the device, once a step
        broken = not (math.isfinite(loss) and math.isfinite(norm))
        total_loss, total_errors, any_broken, *any_flags = self._topology.all_reduce_sum([loss, errors, broken, *flags()])
        if any_broken:
            raise NotFinite(self._name_not_finite(loss, norm, batch.step, lr))
        enter_phase("update", batch.step)
        self.optimizer.step()
        towers = self._topology.tower_ranks  # both towers of a pair have counted the same images
        return StepResult(lr, total_loss / towers, int(total_errors / towers), [flag > 0 for flag in any_flags])

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
        """Weights and velocities as a checkpoint holds them, and their canonical shapes."""
        return build.parameters(self.network, self._config, self.optimizer)

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

    def _name_not_finite(self, loss: float, norm: float, step: int, lr: float) -> str:
        for rank, (rank_loss, rank_norm) in enumerate(self._topology.gather_objects((loss, norm))):
            if not math.isfinite(rank_loss) or not math.isfinite(rank_norm):
                break
        what = f"norm of the gradient (={rank_norm})" if math.isfinite(rank_loss) else f"loss (={rank_loss})"
        process = "" if self._topology.is_single else f" of process {rank}"
        return (f"{what}{process} at step {step} with learning rate {lr:g} is not finite; the update was not made: lower "
                "optimizer.lr and give another --machine.name")
