"""The paper's update rule, and how its learning rate moves.

    v <- momentum v - weight_decay lr w - lr g
    w <- w + v

The learning rate is inside the velocity (paper §5). PyTorch's SGD has it outside; the two differ in the steps after a
change of the rate, where the paper's velocity still carries the old one. Biases have no decay and a rate of their own
(release: twice the weights').

For large batches: linear scaling of the rates (Goyal et al. 2017, arXiv 1706.02677), in `Schedule`, and layer-wise rates
(LARS, You et al. 2017, arXiv 1708.03888), in `Lars`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn

from model.alexnet import AlexNet
from train.config import LarsConfig, OptimizerConfig, ScheduleConfig


class Lars:
    """Layer-wise rates: what the rate of each weight is multiplied with, trust ‖w‖ / (‖g‖ + weight_decay ‖w‖ + epsilon).

    Norms are those of whole canonical weights: of one whose rows lie in two towers, each adds its part. So the factors are the
    same, to rounding, however the network is held. 1 where a norm is 0: else a weight of zeros could never begin to move.
    Not timm's or apex's: their rate is outside the velocity, and they see one process's rows only.

    Args:
        config: trust and epsilon.
        split: the weights of which this process holds only its tower's rows.
        group: the towers of a pair; None when this process holds all.
    """

    def __init__(self, config: LarsConfig, split: Iterable[torch.Tensor] = (), group: Optional[dist.ProcessGroup] = None) -> None:
        self._config, self._split, self._group = config, {id(weight) for weight in split}, group

    def factors(self, weights: list[torch.Tensor], grads: list[torch.Tensor], weight_decay: float) -> list[torch.Tensor]:
        """One factor for each weight, a scalar tensor of its dtype. With a group both towers must ask, for the same weights."""
        norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(grads)]).double().view(2, len(weights))
        if self._group is not None and self._split:
            split = torch.tensor([id(weight) in self._split for weight in weights], device=norms.device)
            squares = torch.where(split, norms.square(), 0.0)
            dist.all_reduce(squares, group=self._group)
            norms = torch.where(split, squares.sqrt(), norms)
        weight, grad = norms
        factors = self._config.trust * weight / (grad + weight_decay * weight + self._config.epsilon)
        return list(torch.where((weight > 0) & (grad > 0), factors, 1.0).to(weights[0].dtype).unbind())


class PaperSGD(torch.optim.Optimizer):
    """Momentum with weight decay as paper §5 writes it. State per parameter: `velocity`, of its shape, from zero.

    Args:
        params: parameters or groups; a group may override `weight_decay`, `lr_factor` (its rate is lr times that), `layerwise`
            (False: not for `lars`) and `layer` (the name by which `set_lr` finds it). A rate of 0 freezes a group.
        lr: learning rate of a group with `lr_factor` 1.
        momentum: share of the velocity that is kept.
        weight_decay: per step and unit of lr.
        lars: layer-wise rates, or none.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float,
                 lars: Optional[Lars] = None) -> None:
        self.lars = lars
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_factor": 1.0,
                                  "layerwise": True, "layer": ""})

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
            if not params or lr == 0:  # frozen: no weight moves, not even by the velocity it has
                continue
            grads = [p.grad for p in params]
            velocities = [self.velocity(p) for p in params]
            decay = group["weight_decay"]
            torch._foreach_mul_(velocities, group["momentum"])
            if self.lars is None or not group["layerwise"]:
                if decay:
                    torch._foreach_add_(velocities, params, alpha=-decay * lr)
                torch._foreach_add_(velocities, grads, alpha=-lr)
            else:
                factors = self.lars.factors(params, grads, decay)
                torch._foreach_addcmul_(velocities, params, factors, value=-decay * lr)
                torch._foreach_addcmul_(velocities, grads, factors, value=-lr)
            torch._foreach_add_(params, velocities)
        return loss

    def velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        """The velocity of a parameter (same shape), made of zeros when there is none yet."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["velocity"]
        return velocity


def build_optimizer(network: nn.Module, config: OptimizerConfig, group: Optional[dist.ProcessGroup] = None,
                    layers: Iterable[str] = ()) -> PaperSGD:
    """Two groups: weights with decay, biases without it and with their own rate (paper §5, release layers-145.cfg).

    Args:
        group: joins the towers of a pair, for LARS of weights that are split between them; None when there is one process a
            network.
        layers: those whose rates differ from the others' at some time (`Schedule.layers`): each has two groups of its own.
    """
    weights = {name: p for name, p in network.named_parameters() if not name.endswith("bias")}
    lars = None
    if config.lars is not None:
        split = [p for name, p in weights.items() if network.tower_of(name).count > 1] if isinstance(network, AlexNet) else []
        lars = Lars(config.lars, split, group)
    alone = sorted(layers)
    groups: list[dict[str, Any]] = []
    for layer in ("", *alone):
        mine = [(name, p) for name, p in network.named_parameters()
                if (name.split(".")[0] == layer if layer else name.split(".")[0] not in alone)]
        groups.append({"params": [p for name, p in mine if name in weights], "layer": layer})
        groups.append({"params": [p for name, p in mine if name not in weights], "layer": layer, "weight_decay": 0.0,
                       "lr_factor": config.bias_lr_factor, "layerwise": False})
    return PaperSGD([group for group in groups if group["params"]], lr=config.lr, momentum=config.momentum,
                    weight_decay=config.weight_decay, lars=lars)


def batch_scale(config: OptimizerConfig, batch: int) -> float:
    """What linear scaling multiplies the rates with, for so many images a step over all processes: 1 without `base_batch`."""
    return batch / config.base_batch if config.base_batch else 1.0


class Schedule:
    """The learning rate as a function of the step, the epoch, and (with a plateau) of the validation errors so far.

    Args:
        config: plateau, milestones or neither.
        lr: the rate at the start, as the recipe has it.
        scale: what this rate and those of milestones are multiplied with (`batch_scale`). A warm-up climbs from the unscaled
            rate when it is above 1 (Goyal et al. §2.2), else from 0.
        layer_rates: factors of single layers at the start (`OptimizerConfig.layer_rates`).
    """

    def __init__(self, config: ScheduleConfig, lr: float, scale: float = 1.0,
                 layer_rates: Optional[Mapping[str, float]] = None) -> None:
        self.config, self.start, self.scale, self._layer_rates = config, lr, scale, dict(layer_rates or {})
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
        low, rate = rate if self.scale > 1 else 0.0, rate * self.scale
        warmup = self.config.warmup_steps
        return low + (rate - low) * (step + 1) / warmup if step < warmup else rate

    def layer_rates(self, epoch: int) -> dict[str, float]:
        """Layer → what its rate is multiplied with in this epoch; 1 for layers that are not in it."""
        rates = dict(self._layer_rates)
        for milestone in self.config.milestones:
            if epoch >= milestone.epoch:
                rates |= milestone.layer_rates
        return rates

    @property
    def layers(self) -> set[str]:
        """Layers that have a rate of their own at some time."""
        return set(self._layer_rates).union(*(milestone.layer_rates for milestone in self.config.milestones))

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


def set_lr(optimizer: PaperSGD, lr: float, layer_rates: Optional[Mapping[str, float]] = None) -> None:
    """Give every group the rate, times its layer's factor; the groups' own factors stay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (layer_rates or {}).get(group["layer"], 1.0)
