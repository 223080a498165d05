"""Layers with learning rates of their own: frozen, slowed, changed by milestones and kept by a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from model.alexnet import AlexNet
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.networks import small
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, lines, pair, same, weights
from train.checkpoint import checkpoint
from train.config import Config
from train.optimizer_config import LarsConfig, Milestone, OptimizerConfig, ScheduleConfig
from train.optimizer import Schedule, build_optimizer, set_lr
from train.recipe import parse

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index, epochs="  epochs: 2")


def read(recipe: Path, *argv: str) -> Config:
    return parse(["--config", str(recipe), *argv]).config


def network_of(config: Config) -> dict[str, torch.Tensor]:
    """Parameters as a run of this config begins with, by canonical name."""
    return {name: p.detach() for name, p in AlexNet(config.model, seed=config.train.seed).named_parameters()}


def moved(run: Path, before: dict[str, torch.Tensor]) -> set[str]:
    """Layers whose weights, and those whose biases, are other than before, in the run's last checkpoint."""
    found = weights(run)
    return {name for name, value in before.items() if not torch.equal(found[f"weight.{name}"], value)}


def test_a_frozen_layer_stays_and_the_others_move(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--optimizer.layer_rates={conv1: 0, fc7: 0}", "--train.epochs=1")
    before = network_of(read(recipe))
    assert moved(tmp_path / "small", before) == {name for name in before if name.split(".")[0] not in ("conv1", "fc7")}
    found = weights(tmp_path / "small")
    assert not found["velocity.conv1.weight"].any() and not found["velocity.fc7.bias"].any()
    assert found["velocity.conv2.weight"].any()


SLOWED = ("--optimizer.layer_rates={fc8: 10, conv2: 0}", "--schedule.plateau=null",
          "--schedule.milestones=[{epoch: 1, lr: 1e-3, layer_rates: {conv1: 0, conv2: 1}}]", "--machine.keep_last=9")


def test_a_milestone_changes_the_factors_and_a_resume_keeps_them(recipe: Path, tmp_path: Path) -> None:
    """conv1 is frozen from epoch 1 on, conv2 until then; fc8 keeps its factor. Cut within either epoch it is the same run."""
    here(recipe, tmp_path, *SLOWED, "--machine.name=whole")
    start, run = network_of(read(recipe)), tmp_path / "whole"
    middle = {name: torch.empty(p.shape) for name, p in start.items()}
    checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[0], {f"weight.{name}": p for name, p in middle.items()},
                    {f"weight.{name}": tuple(p.shape) for name, p in middle.items()}, ALONE, partial=True)
    assert {name.split(".")[0] for name in middle if not torch.equal(middle[name], start[name])} == set(LAYERS) - {"conv2"}
    assert {name.split(".")[0] for name in moved(run, middle)} == set(LAYERS) - {"conv1"}
    assert {line["lr"] for line in lines(run) if line["kind"] == "step" and line["epoch"] == 1} == {1e-3}
    for step in (5, 14):
        here(recipe, tmp_path, *SLOWED, f"--machine.name=cut{step}", f"--machine.stop_after={step}", code=75)
        here(recipe, tmp_path, *SLOWED, f"--machine.name=cut{step}", "--resume")
        same(run, tmp_path / f"cut{step}")


@pytest.mark.slow
def test_two_towers_with_lars_and_layers_of_their_own_train_as_one(recipe: Path, tmp_path: Path) -> None:
    words = ["--optimizer.lars={trust: 0.02, epsilon: 1e-8}", "--optimizer.lr=1", "--train.epochs=1", "--machine.precision=fp64",
             "--optimizer.layer_rates={conv2: 0.5, fc6: 0, fc8: 4}"]
    for start, name in ((here, "one"), (pair, "two")):
        start(recipe, tmp_path, *words, f"--machine.name={name}", "--machine.stop_after=4", code=75)
    one, two, before = weights(tmp_path / "one"), weights(tmp_path / "two"), network_of(read(recipe))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-7, msg=key)  # read as float32
    assert moved(tmp_path / "two", before) == {name for name in before if not name.startswith("fc6")}


def test_factors_by_epoch() -> None:
    milestones = (Milestone(2, 0.1, {"conv1": 0.5}), Milestone(4, 0.01, {"conv1": 0, "fc7": 1}))
    rates = OptimizerConfig(1.0, 0.9, 0.0, 1.0, layer_rates={"fc8": 10, "fc7": 0})
    schedule = Schedule(ScheduleConfig(None, milestones, 0), rates, 8)
    assert schedule.layers == {"conv1", "fc7", "fc8"}
    assert Schedule(ScheduleConfig(None, (), 0), OptimizerConfig(1.0, 0.9, 0.0, 1.0), 8).layers == set()
    assert [schedule.layer_rates(epoch) for epoch in (0, 1, 2, 3, 4, 9)] == [
        {"fc8": 10, "fc7": 0}, {"fc8": 10, "fc7": 0}, *[{"fc8": 10, "fc7": 0, "conv1": 0.5}] * 2,
        *[{"fc8": 10, "fc7": 1, "conv1": 0}] * 2]


def updated(lars: LarsConfig | None, layers: set[str], rates: dict[str, float], steps: int = 3) -> dict[str, torch.Tensor]:
    """Weights of a small float64 network after some steps, with groups for `layers`."""
    network = AlexNet(small(dropout=0.0), seed=5).double()
    config = OptimizerConfig(lr=0.5 if lars else 0.01, momentum=0.9, weight_decay=5e-4, bias_lr_factor=2.0, lars=lars)
    optimizer = build_optimizer(network, config, layers=layers)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 16
    assert [group["layer"] for group in optimizer.param_groups] == [
        name for name in ("", *sorted(layers)) for _ in range(2) if name or len(layers) < 8]
    images = torch.randn(4, 3, 67, 67, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in range(steps):
        set_lr(optimizer, config.lr, rates)
        optimizer.zero_grad()
        functional.cross_entropy(network(images, step=step), torch.arange(4)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("lars", [None, LarsConfig(0.01, 1e-8)], ids=["plain", "LARS"])
def test_groups_of_their_own_change_nothing_by_themselves(lars: LarsConfig | None) -> None:
    """Factors of 1, said or not said, are the same bits as no groups; a layer's factor is its rate times that."""
    plain = updated(lars, set(), {})
    for layers, rates in (({"conv1", "fc8"}, {}), ({"conv1", "fc8"}, {"conv1": 1.0, "fc8": 1.0}), (set(LAYERS), {})):
        found = updated(lars, layers, rates)
        assert all(torch.equal(value, plain[name]) for name, value in found.items())
    start = {name: p.detach().double() for name, p in AlexNet(small(dropout=0.0), seed=5).named_parameters()}
    once = updated(lars, set(), {}, steps=1)
    factored = updated(lars, {"conv1", "fc7", "fc8"}, {"conv1": 0.0, "fc8": 4.0}, steps=1)
    for name, value in factored.items():
        factor = {"conv1": 0, "fc8": 4}.get(name.split(".")[0], 1)
        torch.testing.assert_close(value - start[name], factor * (once[name] - start[name]), rtol=1e-9, atol=1e-15, msg=name)


def test_a_frozen_layer_keeps_its_velocity_and_goes_on_with_it() -> None:
    """Momentum does not carry it on while it is frozen."""
    w = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = build_optimizer(torch.nn.ModuleDict({"conv1": w}), OptimizerConfig(0.1, 0.5, 0.0, 1.0), layers={"conv1"})
    at: list[Any] = []
    for rate in (1.0, 0.0, 0.0, 1.0):
        set_lr(optimizer, 0.1, {"conv1": rate})
        w.weight.grad = torch.ones_like(w.weight)
        optimizer.step()
        at.append(w.weight.item())
    assert at[0] == at[1] == at[2] and at[3] - at[2] == pytest.approx(0.5 * -0.1 - 0.1)


def test_rates_and_origin_are_part_of_a_config(recipe: Path) -> None:
    config = read(recipe, *SLOWED, "--init_from.checkpoint=x", "--init_from.renew=[fc8]")
    assert dataclasses.replace(config) == config and config.init_from.renew == ("fc8",)
    assert config.schedule.milestones[0].layer_rates == {"conv1": 0.0, "conv2": 1.0}
