"""The paper's update rule, and how its learning rate moves.

    v <- momentum v - weight_decay lr w - lr g
    w <- w + v

The learning rate is inside the velocity (paper §5). PyTorch's SGD has it outside; the two differ in the steps after a
change of the rate, where the paper's velocity still carries the old one. Biases have no decay and a rate of their own
(release: twice the weights').
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

import torch
from torch import nn

from train.config import OptimizerConfig, ScheduleConfig


class PaperSGD(torch.optim.Optimizer):
    """Momentum with weight decay as paper §5 writes it. State per parameter: `velocity`, of its shape, from zero.

    Args:
        params: parameters or groups; a group may override `weight_decay` and `lr_factor` (its rate is lr times that).
        lr: learning rate of a group with `lr_factor` 1.
        momentum: share of the velocity that is kept.
        weight_decay: per step and unit of lr.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_factor": 1.0})

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = group["lr"] * group["lr_factor"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            velocities = [self.velocity(p) for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_add_(velocities, params, alpha=-group["weight_decay"] * lr)
            torch._foreach_add_(velocities, grads, alpha=-lr)
            torch._foreach_add_(params, velocities)
        return loss

    def velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        """The velocity of a parameter (same shape), made of zeros when there is none yet."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["velocity"]
        return velocity


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> PaperSGD:
    """Two groups: weights with decay, biases without it and with their own rate (paper §5, release layers-145.cfg)."""
    weights = [p for name, p in network.named_parameters() if not name.endswith("bias")]
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    return PaperSGD([{"params": weights},
                     {"params": biases, "weight_decay": 0.0, "lr_factor": config.bias_lr_factor}],
                    lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


class Schedule:
    """The learning rate as a function of the step, the epoch, and (with a plateau) of the validation errors so far.

    Args:
        config: plateau, milestones or neither.
        lr: the rate at the start.
    """

    def __init__(self, config: ScheduleConfig, lr: float) -> None:
        self.config, self.start = config, lr
        self.drops = 0
        self.best: Optional[float] = None
        self.stale = 0

    def lr(self, step: int, epoch: int) -> float:
        """The rate of one step (both counted from 0)."""
        rate = self.start
        for milestone in self.config.milestones:
            if epoch >= milestone.epoch:
                rate = milestone.lr
        if self.config.plateau is not None:
            rate *= self.config.plateau.factor ** self.drops
        warmup = self.config.warmup_steps
        return rate * (step + 1) / warmup if step < warmup else rate

    def epoch_done(self, validation_error: float) -> bool:
        """Take note of an epoch's top-1 validation error (a share); True when the rate drops because of it."""
        plateau = self.config.plateau
        if plateau is None:
            return False
        if self.best is None or validation_error < self.best - plateau.min_delta:
            self.best, self.stale = validation_error, 0
            return False
        self.stale += 1
        if self.stale < plateau.patience or self.drops >= plateau.drops:
            return False
        self.drops, self.stale = self.drops + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the config; plain numbers."""
        return {"drops": self.drops, "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.drops, self.best, self.stale = int(state["drops"]), state["best"], int(state["stale"])


def set_lr(optimizer: PaperSGD, lr: float) -> None:
    """Give every group the rate; their factors stay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
