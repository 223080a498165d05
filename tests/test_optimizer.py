"""The update rule by hand and against a plain loop; schedules step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.config import Milestone, OptimizerConfig, Plateau, ScheduleConfig
from train.optimizer import PaperSGD, Schedule, build_optimizer, set_lr

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


def test_constant_and_milestones() -> None:
    assert [Schedule(CONSTANT, 0.01).lr(step, step) for step in (0, 5, 90)] == [0.01] * 3
    fixed = Schedule(ScheduleConfig(None, (Milestone(2, 0.001), Milestone(4, 0.0005)), 0), 0.01)
    assert [fixed.lr(0, epoch) for epoch in range(6)] == [0.01, 0.01, 0.001, 0.001, 0.0005, 0.0005]
    assert fixed.epoch_done(0.5) is False


def test_warmup_climbs_to_the_rate() -> None:
    schedule = Schedule(ScheduleConfig(None, (), 4), 0.01)
    assert [schedule.lr(step, 0) for step in range(6)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_plateau_drops_after_patience_and_stops_dropping() -> None:
    schedule = Schedule(ScheduleConfig(Plateau(factor=0.1, patience=2, min_delta=0.01, drops=2), (), 0), 1.0)
    errors = [0.9, 0.8, 0.795, 0.795, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    #         best best  stale  drop  best stale drop stale (no drop left)
    drops = [schedule.epoch_done(error) for error in errors]
    assert drops == [False, False, False, True, False, False, True, False, False, False]
    assert schedule.lr(0, 0) == pytest.approx(0.01)


@pytest.mark.parametrize("cut", range(8))
def test_plateau_resumed_anywhere_is_the_same(cut: int) -> None:
    config = ScheduleConfig(Plateau(factor=0.5, patience=1, min_delta=0.0, drops=5), (), 0)
    errors = [0.9, 0.8, 0.8, 0.7, 0.75, 0.75, 0.6, 0.6]
    whole, before, after = Schedule(config, 1.0), Schedule(config, 1.0), Schedule(config, 1.0)
    for error in errors:
        whole.epoch_done(error)
    for error in errors[:cut]:
        before.epoch_done(error)
    after.load_state_dict(before.state_dict())
    for error in errors[cut:]:
        after.epoch_done(error)
    assert after.state_dict() == whole.state_dict() and whole.drops == 4
