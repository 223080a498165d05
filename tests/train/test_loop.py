"""What the loop computes, against a loop written by hand and against losses on record; that settings reach the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from model.alexnet import AlexNet
from pipeline.index.sample_index import SampleIndex
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from tests.helpers.loaders import train_loader
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import photographs, write_set
from tests.helpers.runs import here, lines, same, watch, weights
from train.checkpoint import checkpoint
from train.recipe import load

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.txt"
# Two epochs of 6 steps: the rate climbs over the first 3 and falls with the second epoch.
SCHEDULE = ("--train.epochs=2", "--train.batch=4", "--schedule.plateau=null", "--schedule.warmup_steps=3",
            "--schedule.milestones=[{epoch: 1, lr: 1e-3}]")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    blobs = photographs(30)
    index = write_set(folder / "set", blobs[:24], blobs[24:], classes=6)
    compute(index, "train", 76).save(stats_path(index.path, 76))
    return write_recipe(folder, index.path)


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, *SCHEDULE)
    return runs / "small"


def test_weights_equal_those_of_a_loop_by_hand(recipe: Path, trained: Path) -> None:
    """v <- 0.9 v - 0.0005 lr w - lr g; w <- w + v; biases with twice the rate and no decay (paper §5, release)."""
    config = load(trained / "config.yaml")
    index = SampleIndex.load(config.data.index)
    network = AlexNet(config.model, seed=1)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    rates = [0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01, 0.01] + [0.001] * 6
    with train_loader("archives", index, "train", config.data, 4, 1, Stats.for_index(index, 76)) as loader:
        for epoch in range(2):
            for batch in loader:
                network.zero_grad()
                functional.cross_entropy(network(batch.images, step=batch.step), batch.labels).backward()
                with torch.no_grad():
                    for name, w in network.named_parameters():
                        rate, decay = rates[batch.step] * (1 + name.endswith("bias")), 0.0 if name.endswith("bias") else 0.0005
                        assert w.grad is not None
                        velocity[name] = 0.9 * velocity[name] - decay * rate * w - rate * w.grad
                        w += velocity[name]
    found = weights(trained)
    assert batch.step == 11
    for name, w in network.named_parameters():
        for kind, ours, began in (("weight", w.detach(), start[name]), ("velocity", velocity[name], 0)):
            # rounding against the whole way gone
            assert (found[f"{kind}.{name}"] - ours).abs().max() < 1e-4 * (ours - began).abs().max(), (kind, name)


def test_losses_are_those_on_record(trained: Path) -> None:
    """To 0.2%: another CPU or version sums in another order, and may draw and encode the pictures a grey level off."""
    golden = [float(line) for line in GOLDEN.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#")]
    found = [line["loss"] for line in lines(trained) if line["kind"] == "step"]
    assert len(golden) == 12 and found == pytest.approx(golden, rel=2e-3)


def test_a_resume_may_add_later_milestones_but_change_none_that_is_passed(recipe: Path, trained: Path, tmp_path: Path) -> None:
    once = (*SCHEDULE, "--train.epochs=1", "--schedule.milestones=[]")
    here(recipe, tmp_path, *once)
    out, _ = here(recipe, tmp_path, *SCHEDULE, "--resume", "--machine.stop_after=7", code=75)
    assert "changed from step 6 on: schedule.milestones: [] -> [{'epoch': 1, 'lr': 0.001, 'layer_rates': {}}]\n" in out
    for words, problem in (([*SCHEDULE, "--schedule.milestones=[]"], "schedule.milestones: [{'epoch': 1, "),
                           (once, "train.epochs (=1) is less than the 2 epochs that")):
        _, err = here(recipe, tmp_path, *words, "--resume", code=2)
        assert problem in err and err.count("\n") == 1, err
    here(recipe, tmp_path, *SCHEDULE, "--resume")
    same(trained, tmp_path / "small")


@pytest.mark.parametrize("precision, layout", [("bf16", "true"), ("fp32", "false")])
def test_precision_and_layout_reach_the_network(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str,
                                                layout: str) -> None:
    seen: set[tuple[bool, torch.dtype, bool]] = set()

    def look(network: AlexNet) -> None:
        def told(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            assert network.conv2.weight.dtype == torch.float32
            last = network.conv2.weight.is_contiguous(memory_format=torch.channels_last)
            assert last == output.is_contiguous(memory_format=torch.channels_last)
            seen.add((network.training, output.dtype, last))
        network.conv2.register_forward_hook(told)
    watch(monkeypatch, look)
    here(recipe, tmp_path, *SCHEDULE, "--train.epochs=1", "--schedule.milestones=[]", f"--machine.precision={precision}",
         f"--machine.channels_last={layout}")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert seen == {(True, dtype, layout == "true"), (False, dtype, layout == "true")}


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, *SCHEDULE, "--machine.stop_after=5", code=75)
    return runs / "small"


@pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
def test_what_is_not_finite_changes_no_weight(recipe: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              what: str) -> None:
    """At step 5: the weights in memory are still those of the last checkpoint, and those of a run that stopped there."""
    networks: list[AlexNet] = []

    def look(network: AlexNet) -> None:
        networks.append(network)
        count = iter(range(100))

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (float("nan") if next(count) == 5 else 1)

        def spoil_logits(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return spoil(output)
        if what == "loss":
            network.register_forward_hook(spoil_logits)
        else:
            network.conv5.weight.register_hook(spoil)
    with monkeypatch.context() as patch:
        watch(patch, look)
        _, err = here(recipe, tmp_path, *SCHEDULE, "--machine.checkpoint_steps=1", "--machine.name=spoilt", code=3)
    assert f"error: {what} (=nan) at step 5 with learning rate 0.01 is not finite; the update was not made: lower" in err
    assert "Traceback" not in err
    before, kept = weights(stopped), weights(tmp_path / "spoilt")
    for name, parameter in networks[0].named_parameters():
        assert torch.equal(kept[f"weight.{name}"], before[f"weight.{name}"]), name
        assert torch.equal(parameter.detach(), before[f"weight.{name}"]), name


def test_the_last_step_of_an_epoch_is_saved_once_after_its_validation(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, *SCHEDULE, "--machine.checkpoint_steps=3", "--machine.keep_last=99")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "small/checkpoints")] == [
        "step-000000003", "step-000000006-epoch-0001", "step-000000009", "step-000000012-epoch-0002"]
