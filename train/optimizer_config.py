"""Configuration of the optimizer and the learning rate schedule (recipe groups `optimizer` and `schedule`), paper §5.

The docstrings are the text of `--help`. Imports nothing heavy.
"""
import math
from dataclasses import dataclass, field
from typing import Any, Optional

from model.config import LAYER_NAME, require


def check(config: object, key: str, ok: bool, rule: str) -> None:
    """`require` for the attribute of `config` that the last part of the key names."""
    require(ok, key, getattr(config, key.rpartition(".")[2]), rule)


def _layer_rates(rates: object, key: str) -> dict[str, float]:
    """Factors by layer, checked. That the network has these layers is checked by `Config`."""
    if not isinstance(rates, dict):
        raise ValueError(f"{key} (={rates}) must map layers to factors; write {{conv1: 0.1}}")
    for name, factor in rates.items():
        require(bool(LAYER_NAME.fullmatch(str(name))), key, name, "must name layers, such as conv1 or fc8; correct it")
        ok = isinstance(factor, (int, float)) and not isinstance(factor, bool) and math.isfinite(factor) and factor >= 0
        require(ok, f"{key}.{name}", factor, "must be a factor of at least 0, which freezes the layer; correct it")
    return {name: float(factor) for name, factor in rates.items()}


@dataclass(frozen=True)
class LarsConfig:
    """LARS, layer-wise adaptive rates for large batches (arXiv 1708.03888): the rate of a weight is multiplied by
    trust ‖w‖ / (‖g‖ + weight_decay ‖w‖ + epsilon), by 1 where a norm is 0. Biases keep theirs.

    Attributes:
        trust: trust coefficient (the paper's AlexNet: 0.001).
        epsilon: added to the denominator (1e-8).
    """
    trust: float
    epsilon: float

    def __post_init__(self) -> None:
        check(self, "optimizer.lars.trust", self.trust > 0, "must be positive; You et al. use 0.001")
        check(self, "optimizer.lars.epsilon", self.epsilon >= 0, "must not be negative; try 1e-8")


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule of paper §5: v <- momentum v - weight_decay lr w - lr g; w <- w + v.

    Attributes:
        lr: learning rate at the start (paper: 0.01).
        momentum: momentum (paper: 0.9).
        weight_decay: weight decay of weights; biases have none (paper: 0.0005).
        bias_lr_factor: learning rate of biases over that of weights (release: 2).
        base_batch: batch size for which the rates were chosen: they are multiplied by train.batch / base_batch (linear scaling,
            arXiv 1706.02677), and schedule.warmup_steps climb from the unscaled rate; 0 for no scaling.
        lars: layer-wise adaptive rates, for batches of thousands; null for none.
        layer_rates: layer → factor of its rate, from the start; 0 freezes it. {} for none.
    """
    lr: float
    momentum: float
    weight_decay: float
    bias_lr_factor: float
    base_batch: int = 0
    lars: Optional[LarsConfig] = None
    layer_rates: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_rates", _layer_rates(self.layer_rates, "optimizer.layer_rates"))
        check(self, "optimizer.lr", self.lr > 0, "must be positive; the paper starts at 0.01")
        check(self, "optimizer.momentum", 0 <= self.momentum < 1, "must be in [0, 1); the paper uses 0.9")
        check(self, "optimizer.weight_decay", self.weight_decay >= 0, "must not be negative; the paper uses 0.0005")
        check(self, "optimizer.bias_lr_factor", self.bias_lr_factor > 0, "must be positive; the release uses 2")
        check(self, "optimizer.base_batch", self.base_batch >= 0, "must not be negative; 0 is no scaling")


@dataclass(frozen=True)
class Plateau:
    """Divide the learning rate when the validation error stops improving (paper §5: by 10, three times).

    Attributes:
        factor: factor of a drop (paper: 0.1).
        patience: epochs without improvement before a drop; the paper's authors decided by eye.
        min_delta: an improvement lowers the top-1 validation error by more than this, as a share (0.001 = 0.1 points).
        drops: largest number of drops (paper: 3).
    """
    factor: float
    patience: int
    min_delta: float
    drops: int

    def __post_init__(self) -> None:
        check(self, "schedule.plateau.factor", 0 < self.factor < 1, "must be in (0, 1); the paper uses 0.1")
        check(self, "schedule.plateau.patience", self.patience >= 1, "must be at least 1 epoch; try 5")
        check(self, "schedule.plateau.min_delta", self.min_delta >= 0, "must not be negative; try 0.001")
        check(self, "schedule.plateau.drops", self.drops >= 0, "must not be negative; the paper uses 3")


@dataclass(frozen=True)
class Milestone:
    """Learning rate from an epoch on.

    Attributes:
        epoch: first epoch with this rate, counted from 0.
        lr: learning rate.
        layer_rates: layer → factor of its rate from this epoch on, as in optimizer.layer_rates; layers not named keep theirs.
    """
    epoch: int
    lr: float
    layer_rates: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_rates", _layer_rates(self.layer_rates, "schedule.milestones.layer_rates"))
        check(self, "schedule.milestones.epoch", self.epoch >= 1, "must be at least 1; epoch 0 has optimizer.lr")
        check(self, "schedule.milestones.lr", self.lr > 0, "must be positive; give the rate from that epoch on")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate schedule: `plateau`, or `milestones`, or (null and []) a constant rate.

    Attributes:
        plateau: drop when the validation error stops improving; null for none.
        milestones: rates by epoch, ascending; [] for none.
        warmup_steps: first steps, over which the rate climbs linearly; 0, as in the paper, for none.
    """
    plateau: Optional[Plateau]
    milestones: tuple[Milestone, ...]
    warmup_steps: int

    def __post_init__(self) -> None:
        epochs = [milestone.epoch for milestone in self.milestones]
        require(epochs == sorted(set(epochs)), "schedule.milestones", epochs, "must have ascending epochs; sort them")
        require(self.plateau is None or not self.milestones, "schedule.milestones", epochs,
                "cannot be given together with schedule.plateau; make one of them null or []")
        check(self, "schedule.warmup_steps", self.warmup_steps >= 0, "must not be negative; 0 is none")
