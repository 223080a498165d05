"""The update rule by hand and against a plain loop; LARS in NumPy, and in two towers as in one; schedules step by step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn import functional

from tests.helpers.kernels import DEVICE, rounding  # noqa: F401 (a fixture)
from tests.helpers.networks import small

from model.alexnet import AlexNet
from model.towers import BOTH, Tower
from train.optimizer_config import LarsConfig, Milestone, OptimizerConfig, Plateau, ScheduleConfig
from train.optimizer import Lars, PaperSGD, Schedule, build_optimizer, set_lr

CONSTANT = ScheduleConfig(plateau=None, milestones=(), warmup_steps=0)


def test_two_steps_by_hand() -> None:
    """w=1, g=0.5, lr=0.1, momentum 0.9, decay 0.01; then lr=0.01 and g=1."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = PaperSGD([w], lr=0.1, momentum=0.9, weight_decay=0.01)
    w.grad = torch.tensor([0.5], dtype=torch.float64)
    optimizer.step()
    # v = 0 - 0.01*0.1*1 - 0.1*0.5 = -0.051; w = 0.949
    assert w.item() == pytest.approx(0.949, abs=1e-15)
    set_lr(optimizer, 0.01)
    w.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    # v = 0.9*-0.051 - 0.01*0.01*0.949 - 0.01*1 = -0.0559949 (the old rate lives on in v); w = 0.8930051
    assert w.item() == pytest.approx(0.8930051, abs=1e-15)


def test_differs_from_torch_sgd_only_after_a_change_of_rate() -> None:
    def run(rates: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        ours = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        a = PaperSGD([ours], lr=rates[0], momentum=0.9, weight_decay=0.01)
        b = torch.optim.SGD([theirs], lr=rates[0], momentum=0.9, weight_decay=0.01)
        for rate in rates:
            set_lr(a, rate)
            b.param_groups[0]["lr"] = rate
            for w, optimizer in ((ours, a), (theirs, b)):
                optimizer.zero_grad()
                (w ** 3).sum().backward()
                optimizer.step()
        return ours.detach(), theirs.detach()
    ours, theirs = run([0.1, 0.1, 0.1])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)  # same numbers, another order of operations
    ours, theirs = run([0.1, 0.1, 0.01])
    assert (ours - theirs).abs().max() > 1e-3


def test_network_against_a_plain_loop() -> None:
    """Groups, decay and factors of a network, 20 steps with a drop of the rate, against scalars in a Python loop."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    config = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.05, bias_lr_factor=2.0)
    optimizer = build_optimizer(network, config)
    naive = {name: p.detach().clone() for name, p in network.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in naive.items()}
    for step in range(20):
        lr = 0.1 if step < 10 else 0.01
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        network(torch.full((5, 3), float(step % 3), dtype=torch.float64)).square().sum().backward()
        for name, p in network.named_parameters():
            bias = name.endswith("bias")
            rate, decay = (lr * 2, 0.0) if bias else (lr, 0.05)
            assert p.grad is not None
            for w, v, g in zip(naive[name].view(-1), velocity[name].view(-1), p.grad.view(-1)):
                v.copy_(0.9 * v - decay * rate * w - rate * g)
                w.copy_(w + v)
        optimizer.step()
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.detach(), naive[name], rtol=1e-12, atol=1e-14)


def test_velocity_survives_state_dict() -> None:
    w = torch.ones(3, requires_grad=True)
    first = PaperSGD([w], lr=0.1, momentum=0.9, weight_decay=0.0)
    w.grad = torch.ones(3)
    first.step()
    second = PaperSGD([w], lr=0.5, momentum=0.1, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.velocity(w), first.velocity(w)) and second.param_groups[0]["lr"] == 0.1


# --- LARS

def test_lars_by_hand() -> None:
    """w=(3, 4), g=(0, 2), trust 0.1, decay 0.5, epsilon 0.5: 0.1 * 5 / (2 + 0.5 * 5 + 0.5) = 0.1; a zero weight has factor 1."""
    w, zero = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in ([3.0, 4.0], [0.0, 0.0]))
    optimizer = PaperSGD([w, zero], lr=1.0, momentum=0.9, weight_decay=0.5, lars=Lars(LarsConfig(trust=0.1, epsilon=0.5)))
    w.grad, zero.grad = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    optimizer.step()
    # w: v = -0.1 * (0.5 w + g) = -(0.15, 0.4)
    assert w.tolist() == pytest.approx([2.85, 3.6], abs=1e-15) and zero.tolist() == [0.0, -2.0]
    w.grad, zero.grad = torch.zeros(2, dtype=torch.float64), None
    optimizer.step()
    # no gradient at all: factor 1; v = 0.9 * -(0.15, 0.4) - 0.5 w
    assert w.tolist() == pytest.approx([2.85 - 0.135 - 1.425, 3.6 - 0.36 - 1.8], abs=1e-15)


def test_lars_of_a_network_against_numpy() -> None:
    """Weights have factors, biases have none; the rate is inside the velocity, so a drop of it works from the next step on."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = build_optimizer(network, OptimizerConfig(lr=2.0, momentum=0.9, weight_decay=0.05, bias_lr_factor=2.0,
                                                         lars=LarsConfig(trust=0.02, epsilon=1e-8)))
    naive = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
    velocity = {name: np.zeros_like(p) for name, p in naive.items()}
    for step in range(10):
        lr = 2.0 if step < 5 else 0.2
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        network(torch.full((5, 3), float(step % 3 + 1), dtype=torch.float64)).square().mean().backward()
        for name, p in network.named_parameters():
            assert p.grad is not None
            w, g = naive[name], p.grad.numpy()
            if name.endswith("bias"):
                rate, decay = 2 * lr, 0.0
            else:
                decay = 0.05
                rate = lr * 0.02 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w) + 1e-8)
            velocity[name] = 0.9 * velocity[name] - rate * (decay * w + g)
            naive[name] = w + velocity[name]
        optimizer.step()
        for name, p in network.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), naive[name], rtol=1e-12, atol=1e-14)


def test_lars_in_float32() -> None:
    w = torch.full((4,), 2.0, requires_grad=True)
    optimizer = PaperSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, lars=Lars(LarsConfig(trust=0.5, epsilon=0.0)))
    w.grad = torch.ones(4)
    optimizer.step()
    assert w.tolist() == [1.0] * 4  # 0.5 * 4 / 2 = 1


NETWORK = small(dropout=0.0, lrn=None)


def trained(tower: Tower) -> dict[str, torch.Tensor]:
    """Weights after some steps with LARS, in float64."""
    torch.set_num_threads(1)
    network = AlexNet(NETWORK, seed=5, tower=tower).double()
    config = OptimizerConfig(lr=1.0, momentum=0.9, weight_decay=5e-4, bias_lr_factor=2.0, lars=LarsConfig(0.01, 1e-8))
    optimizer = build_optimizer(network, config, towers=tower.group)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        images = torch.randn(4, 3, 67, 67, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(network(images, step=step), torch.arange(4)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}


def tower_process(rank: int, folder: Path) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        results: dict[str, Any] = trained(Tower(rank, 2, dist.group.WORLD))
        whole, half = torch.tensor([3.0, 4.0]), torch.tensor([[3.0], [4.0]][rank])  # one in both towers, one split
        lars = Lars(LarsConfig(trust=1.0, epsilon=0.0), [half], dist.group.WORLD)
        results["factors"] = torch.stack(lars.factors([whole, half], [torch.ones(2), torch.full((1,), rank + 1.0)], 0.0))
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_lars_in_two_towers_equals_one(tmp_path: Path) -> None:
    multiprocessing.spawn(tower_process, (tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for half in halves:
        # the whole one is not counted twice: 5 / sqrt(2); the split one is 5 / sqrt(1 + 4)
        assert half.pop("factors").tolist() == pytest.approx([5 / 2 ** 0.5, 5 ** 0.5])
    for name, expected in trained(BOTH).items():
        # Sums in another order, 1e-16 a term; norms of the halves only would differ by a third.
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", ["put back", "put back, LARS", "triton"])
def test_on_a_device_whose_flags_the_host_does_not_know(way: str, monkeypatch: pytest.MonkeyPatch,
                                                        rounding: None) -> None:  # noqa: F811
    """The same bits as on a CPU: while frozen, and a group at a rate of 0, nothing moves."""
    results = []
    for apart in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((9, 5), (7,), (3, 2))]
        optimizer = PaperSGD([{"params": params[:1]}, {"params": params[1:2], "weight_decay": 0.0, "layerwise": False},
                              {"params": params[2:], "layer": "last"}], lr=0.1, momentum=0.9, weight_decay=0.05,
                             lars=Lars(LarsConfig(0.1, 1e-8)) if "LARS" in way else None,
                             kernels="triton" if apart and way == "triton" else "torch")
        with monkeypatch.context() as patch:
            if apart and way != "triton":
                patch.setattr("train.optimizer._is_on_host", lambda flag: False)
            for step in range(5):
                set_lr(optimizer, 0.1 / (step + 1), {"last": float(step != 2)})
                for parameter in params:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
                    if step == 3:
                        parameter.grad.fill_(float("nan"))
                optimizer.step(torch.tensor(optimizer.rates(), dtype=torch.float64, device=DEVICE),
                               torch.tensor(step == 3, device=DEVICE))
        results.append([tensor.detach() for p in params for tensor in (p, optimizer.velocity(p))])
    assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(*results, strict=True))


# --- schedules

def schedule_of(config: ScheduleConfig, lr: float = 1.0, base_batch: int = 0, batch: int = 128) -> Schedule:
    return Schedule(config, OptimizerConfig(lr, momentum=0.9, weight_decay=0.0, bias_lr_factor=1.0, base_batch=base_batch), batch)


def test_constant_and_milestones() -> None:
    assert [schedule_of(CONSTANT, 0.01).lr(step, step) for step in (0, 5, 90)] == [0.01] * 3
    fixed = schedule_of(ScheduleConfig(None, (Milestone(2, 0.001), Milestone(4, 0.0005)), 0), 0.01)
    assert [fixed.lr(0, epoch) for epoch in range(6)] == [0.01, 0.01, 0.001, 0.001, 0.0005, 0.0005]
    assert fixed.epoch_done(0.5) is False


def test_warmup_climbs_to_the_rate() -> None:
    schedule = schedule_of(ScheduleConfig(None, (), 4), 0.01)
    assert [schedule.lr(step, 0) for step in range(6)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_linear_scaling_of_all_rates() -> None:
    """Batch 512 for rates chosen at 128, with a warm-up of 4 steps from the rate of 128 (Goyal et al.)."""
    assert schedule_of(CONSTANT, 0.01, batch=512).lr(0, 0) == 0.01
    schedule = schedule_of(ScheduleConfig(None, (Milestone(2, 0.001),), 4), 0.01, 128, 512)
    assert [schedule.lr(step, 0) for step in range(5)] == pytest.approx([0.0175, 0.025, 0.0325, 0.04, 0.04])
    assert schedule.lr(100, 2) == pytest.approx(0.004)
    smaller = schedule_of(ScheduleConfig(None, (), 4), 0.01, 128, 32)  # from 0: the unscaled rate would be a peak
    assert [smaller.lr(step, 0) for step in (0, 3, 4)] == pytest.approx([0.0025 / 4, 0.0025, 0.0025])
    plateau = schedule_of(ScheduleConfig(Plateau(0.1, 1, 0.0, 1), (), 0), 0.01, 128, 512)
    assert [plateau.epoch_done(error) for error in (0.5, 0.6)] == [False, True] and plateau.lr(9, 2) == pytest.approx(0.004)


def test_plateau_drops_after_patience_and_stops_dropping() -> None:
    schedule = schedule_of(ScheduleConfig(Plateau(factor=0.1, patience=2, min_delta=0.01, drops=2), (), 0))
    errors = [0.9, 0.8, 0.795, 0.795, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    #         best best  stale  drop  best stale drop stale (no drop left)
    drops = [schedule.epoch_done(error) for error in errors]
    assert drops == [False, False, False, True, False, False, True, False, False, False]
    assert schedule.lr(0, 0) == pytest.approx(0.01)


@pytest.mark.parametrize("cut", range(8))
def test_plateau_resumed_anywhere_is_the_same(cut: int) -> None:
    config = ScheduleConfig(Plateau(factor=0.5, patience=1, min_delta=0.0, drops=5), (), 0)
    errors = [0.9, 0.8, 0.8, 0.7, 0.75, 0.75, 0.6, 0.6]
    whole, before, after = schedule_of(config), schedule_of(config), schedule_of(config)
    for error in errors:
        whole.epoch_done(error)
    for error in errors[:cut]:
        before.epoch_done(error)
    after.load_state_dict(before.state_dict())
    for error in errors[cut:]:
        after.epoch_done(error)
    assert after.state_dict() == whole.state_dict() and whole.drops == 4
