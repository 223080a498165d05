"""SGD with momentum and weight decay (paper §5), LARS, and the learning rate schedule: drops on a plateau, or milestones.

    v <- momentum v - weight_decay lr w - lr g
    w <- w + v

The learning rate is inside the velocity (paper §5). PyTorch's SGD has it outside; the two differ in the steps after a change of
the rate, when the paper's velocity still carries the old one. Biases have no decay and a rate of their own (release: twice).
"""
import importlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn

from model.alexnet import AlexNet
from model.config import Kernels
from model.kernels import takes_triton
from train.optimizer_config import LarsConfig, OptimizerConfig, ScheduleConfig


class Lars:
    """Layer-wise adaptive rates (You et al. 2017): factors trust ‖w‖ / (‖g‖ + weight_decay ‖w‖ + epsilon) of the learning rate.
    Norms are of whole canonical weights: of the weights in `split` this process holds its tower's rows, and `group`, the two
    towers, add up theirs, so the factors are the same, up to rounding, for one process and two. The factor is 1 where a norm is
    0: a weight of zeros could never move otherwise. timm's and apex's differ: rate outside the velocity, norms of one process."""

    def __init__(self, config: LarsConfig, split: Iterable[torch.Tensor] = (), group: Optional[dist.ProcessGroup] = None) -> None:
        self._config, self._split, self._group = config, {id(weight) for weight in split}, group

    def factors(self, weights: list[torch.Tensor], grads: list[torch.Tensor], weight_decay: float) -> list[torch.Tensor]:
        """One scalar tensor per weight, of its dtype. Both towers must call it, with the same weights."""
        norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(grads)]).double().view(2, len(weights))
        if self._group is not None and self._split:
            split = torch.tensor([id(weight) in self._split for weight in weights], device=norms.device)
            squares = torch.where(split, norms.square(), 0.0)
            dist.all_reduce(squares, group=self._group)
            norms = torch.where(split, squares.sqrt(), norms)
        weight, grad = norms
        factors = self._config.trust * weight / (grad + weight_decay * weight + self._config.epsilon)
        return list(torch.where((weight > 0) & (grad > 0), factors, 1.0).to(weights[0].dtype).unbind())


def _is_on_host(flag: torch.Tensor) -> bool:
    """Whether its value is known here without synchronisation."""
    return flag.is_cpu


def _add_scaled(sums: list[torch.Tensor], terms: list[torch.Tensor], factor: torch.Tensor,
                factors: Optional[list[torch.Tensor]]) -> None:
    """sums <- sums + factor factors terms, each of the optional `factors` () for one term; the same bits on both ways."""
    if _is_on_host(factor):  # vectorised; what follows is not, on a CPU
        if factors is None:
            torch._foreach_add_(sums, terms, alpha=factor.item())
        else:
            torch._foreach_addcmul_(sums, terms, factors, value=factor.item())
        return
    factor = factor.to(sums[0].dtype)
    if factors is None:
        torch._foreach_addcmul_(sums, terms, [factor] * len(sums))
    else:
        torch._foreach_addcmul_(sums, torch._foreach_mul(terms, factor), factors)


class PaperSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay as in paper §5. State per parameter: `velocity`, of its shape, initially zero.
    A group of `params` may override `weight_decay`, `lr_factor` (its rate is lr times that), `layerwise` (False: without `lars`)
    and `layer` (the name of its rate in `Schedule.layer_rates`). A rate of 0 freezes a group. `kernels`: see model/kernels."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float,
                 lars: Optional[Lars] = None, kernels: Kernels = "torch") -> None:
        self.lars, self.kernels = lars, kernels
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "lr_factor": 1.0,
                                  "layerwise": True, "layer": ""})

    def rates(self) -> list[float]:
        """What `step` takes as `rates`: for each group its learning rate and its weight decay times that, both negative."""
        rates = [-group["lr"] * group["lr_factor"] for group in self.param_groups]
        return [number for group, rate in zip(self.param_groups, rates) for number in (rate, group["weight_decay"] * rate)]

    @torch.no_grad()
    def step(self, rates: Optional[torch.Tensor] = None,  # type: ignore[override]  # no closure
             frozen: Optional[torch.Tensor] = None) -> None:
        """Update every parameter that has a gradient, without synchronisation. `rates`: `self.rates()` as (2 groups,) float64,
        default: as they are now. `frozen`: () bool; while True nothing changes. Both on the parameters' device."""
        device = self.param_groups[0]["params"][0].device
        if rates is None:
            rates = torch.tensor(self.rates(), dtype=torch.float64, device=device)
        triton = takes_triton(self.kernels, device)
        # A rate of 0 freezes a group: no weight moves, not even by its remaining velocity.
        holds = rates[::2] == 0 if frozen is None else (rates[::2] == 0) | frozen
        for group, (rate, decay), hold in zip(self.param_groups, rates.view(-1, 2), holds):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            velocities, dtype = [self.velocity(p) for p in params], params[0].dtype
            plain = self.lars is None or not group["layerwise"]
            if triton and plain and (sgd := importlib.import_module("model.kernels.sgd")).takes(params):
                sgd.update(params, velocities, [p.grad for p in params], momentum=group["momentum"], rate=rate.to(dtype),
                           decay=decay.to(dtype), hold=hold)
            elif not _is_on_host(hold):  # what must be held is put back
                changed = [*velocities, *params]
                before = [tensor.clone() for tensor in changed]
                self._update(group, params, velocities, rate, decay)
                for tensor, kept in zip(changed, before):
                    torch.where(hold, kept, tensor, out=tensor)
            elif not hold:
                self._update(group, params, velocities, rate, decay)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor], velocities: list[torch.Tensor], rate: torch.Tensor,
                decay: torch.Tensor) -> None:
        """v <- momentum v + decay w + rate g; w <- w + v. `rate`, `decay`: () float64, negative."""
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        torch._foreach_mul_(velocities, group["momentum"])
        factors = None
        if self.lars is not None and group["layerwise"]:
            factors = self.lars.factors(params, grads, group["weight_decay"])
        if group["weight_decay"]:
            _add_scaled(velocities, params, decay, factors)
        _add_scaled(velocities, grads, rate, factors)
        torch._foreach_add_(params, velocities)

    def velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        """The velocity of a parameter, created as zeros on first use."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["velocity"]
        return velocity


def build_optimizer(network: nn.Module, config: OptimizerConfig, layers: Collection[str] = (),
                    towers: Optional[dist.ProcessGroup] = None) -> PaperSGD:
    """The optimizer of a network: one group of weights, with decay, and one of biases, without decay and with their own rate
    (paper §5, release layers-145.cfg). `layers` with a learning rate of their own at some time (`Schedule.layers`) get two groups
    each. `towers`: the two processes of a network split in towers, for LARS."""
    lars = None
    if config.lars is not None:
        split = [p for name, p in network.named_parameters() if network.tower_of(name).count > 1] \
            if isinstance(network, AlexNet) else []
        lars = Lars(config.lars, split, towers)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        layer, is_bias = name.split(".")[0], name.endswith("bias")
        layer = layer if layer in layers else ""
        group = groups.setdefault((layer, is_bias), {"params": [], "layer": layer})
        if is_bias:
            group |= {"weight_decay": 0.0, "lr_factor": config.bias_lr_factor, "layerwise": False}
        group["params"].append(parameter)
    return PaperSGD([groups[key] for key in sorted(groups)], lr=config.lr, momentum=config.momentum,
                    weight_decay=config.weight_decay, lars=lars,
                    kernels=network.kernels if isinstance(network, AlexNet) else "torch")


class Schedule:
    """The learning rate as a function of the step, the epoch, and (with a plateau) the validation errors so far.
    Rates of the recipe are for batches of `optimizer.base_batch` images and are scaled linearly to `batch`, the images of a step
    over all processes (Goyal et al. 2017). A warm-up climbs from the unscaled rate when scaling raises it, else from 0."""

    def __init__(self, config: ScheduleConfig, optimizer: OptimizerConfig, batch: int) -> None:
        self.config, self._optimizer = config, optimizer
        self._scale = batch / optimizer.base_batch if optimizer.base_batch else 1.0
        self.best: Optional[float] = None
        self.drops, self.stale = 0, 0

    def lr(self, step: int, epoch: int) -> float:
        """The learning rate of a step (both counted from 0)."""
        rate = self._optimizer.lr
        for milestone in self.config.milestones:
            if epoch >= milestone.epoch:
                rate = milestone.lr
        if self.config.plateau is not None:
            rate *= self.config.plateau.factor ** self.drops
        low, rate = rate if self._scale > 1 else 0.0, rate * self._scale
        warmup = self.config.warmup_steps
        return low + (rate - low) * (step + 1) / warmup if step < warmup else rate

    def layer_rates(self, epoch: int) -> dict[str, float]:
        """Layer → factor of its learning rate in this epoch; 1 for layers that are not in it."""
        rates = dict(self._optimizer.layer_rates)
        for milestone in self.config.milestones:
            if epoch >= milestone.epoch:
                rates |= milestone.layer_rates
        return rates

    @property
    def layers(self) -> set[str]:
        """Layers that have a learning rate of their own at some time."""
        return set(self._optimizer.layer_rates).union(*(milestone.layer_rates for milestone in self.config.milestones))

    def epoch_done(self, validation_error: float) -> bool:
        """Record an epoch's top-1 validation error (a share); True when the learning rate drops because of it."""
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
        """Everything that is not in the config; plain numbers."""
        return {"drops": self.drops, "best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drops, self.best, self.stale = int(state["drops"]), state["best"], int(state["stale"])


def set_lr(optimizer: PaperSGD, lr: float, layer_rates: Optional[Mapping[str, float]] = None) -> None:
    """Set the learning rate of every group, times its layer's factor; the groups' `lr_factor` stays."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (layer_rates or {}).get(group["layer"], 1.0)
