"""Stopped at an exact moment, in one process and in one of two; and what a resume finds: one of each place a run can stop."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from model.alexnet import AlexNet
from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import PAIR, finish, here, launch, lines, pair, same, watch
from train.checkpoint import checkpoint
from train.main import main

# 76 images: epochs end after 10, 19 and 29 steps of 8; the rate falls with the second.
RATES = ("--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 1e-3}]", "--machine.test_batch=8")


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, *RATES)
    return runs / "small"


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]


def signal_at(network: AlexNet, training: bool, number: int) -> None:
    """SIGTERM to this process when the network sees its batch of this number (from 0), of training or of tests."""
    count = iter(range(10 ** 6))

    def send(module: Any, inputs: Any) -> None:
        if module.training == training and next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
    network.register_forward_pre_hook(send)


def test_stopped_in_a_validation_twice_and_resumed(recipe: Path, whole: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the epoch is lost, nothing of the next is trained before its validation, and the rates are told right."""
    with monkeypatch.context() as patch:
        watch(patch, lambda network: signal_at(network, False, 4))  # three batches a validation: in the second one
        out, _ = here(recipe, tmp_path, *RATES, code=75)
    step = int(names(tmp_path / "small")[-1].split("-")[1])
    epochs = [line["step"] for line in lines(whole) if line["kind"] == "epoch"]
    assert step == epochs[1] and f"stopped and saved at step {step};" in out
    assert names(tmp_path / "small")[-1] == f"step-{step:09d}", "before its validation"
    with monkeypatch.context() as patch:
        watch(patch, lambda network: signal_at(network, False, 0))
        out, _ = here(recipe, tmp_path, *RATES, "--resume", code=75)
    assert f"at step {step}\n" in out and names(tmp_path / "small")[-1] == f"step-{step:09d}"
    here(recipe, tmp_path, *RATES, "--resume")
    same(whole, tmp_path / "small")
    assert [line["lr"] for line in lines(tmp_path / "small") if line["kind"] == "epoch"] == [1e-2, 1e-3, 1e-3]


def test_a_signal_to_one_of_two_stops_both_at_the_same_step(recipe: Path, tmp_path: Path) -> None:
    """To the second process: in training, then in a validation; then both go on, and end as if nothing had been."""
    pair(recipe, tmp_path, *RATES, "--machine.name=whole")
    for resume, training, number, expected in (([], "training", 5, "step-000000006"),
                                               (["--resume"], "testing", 1, "step-000000010")):
        command = [*PAIR, "tests.train.test_train_stops", "signal", training, str(number), "--config", str(recipe),
                   f"--machine.runs={tmp_path}", *RATES, "--machine.timeout_s=20", *resume]
        out, err = finish(launch(command), code=1)
        assert f"stopped and saved at step {int(expected[-9:])};" in out, out + err
        assert out.count("left with 75") == 2, out + err
        assert names(tmp_path / "small")[-1] == expected
        checkpoint.verify(tmp_path / "small/checkpoints" / expected)
    pair(recipe, tmp_path, *RATES, "--resume")
    same(tmp_path / "whole", tmp_path / "small")


def test_a_gradient_that_is_not_finite_in_one_of_two_stops_both(recipe: Path, tmp_path: Path) -> None:
    command = [*PAIR, "tests.train.test_train_stops", "spoil", "training", "5", "--config", str(recipe),
               f"--machine.runs={tmp_path}", *RATES, "--machine.timeout_s=20", "--machine.checkpoint_steps=1"]
    out, err = finish(launch(command), code=1)
    assert "norm of the gradient (=nan) of process 1 at step 5 with learning rate 0.01 is not finite" in err, err
    assert out.count("left with 3") == 2 and names(tmp_path / "small")[-1] == "step-000000005", err


def test_damaged_newest_does_not_cost_the_new_ones(recipe: Path, tmp_path: Path) -> None:
    """Two damaged ones of later steps lie there, as many as are kept: what is saved after a resume stays, and is resumed."""
    here(recipe, tmp_path, *RATES, "--machine.stop_after=6", "--machine.checkpoint_steps=2", "--machine.keep_last=9", code=75)
    root = tmp_path / "small/checkpoints"
    for step in (4, 6):
        (root / f"step-{step:09d}/stats.npz").write_bytes(b"damaged")
    out, _ = here(recipe, tmp_path, *RATES, "--resume", "--machine.stop_after=3", code=75)
    assert "step-000000002 at step 2" in out and "is now damaged-step-000000004" in out and "is now damaged-step-000000006" in out
    assert names(tmp_path / "small") == ["step-000000002", "step-000000003"]
    out, _ = here(recipe, tmp_path, *RATES, "--resume", "--machine.stop_after=4", code=75)
    assert "step-000000003 at step 3" in out and "WARNING" not in out
    assert {path.name for path in root.glob("damaged-*")} == {"damaged-step-000000004", "damaged-step-000000006"}


def in_the_second_of_two(what: str, training: bool, number: int, argv: list[str]) -> int:
    """`train.main` with something happening in the second process: what torchrun starts for the tests above."""
    from train import build

    made = build.network

    def network(config: Any, where: Any) -> AlexNet:
        network = made(config, where)
        count = iter(range(10 ** 6))
        if where.tower_rank == 1 and what == "signal":
            signal_at(network, training, number)
        elif where.tower_rank == 1:
            network.conv5.weight.register_hook(lambda g: g * float("nan") if next(count) == number else g)
        return network
    build.network = network
    code = main(argv)
    print(f"left with {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(in_the_second_of_two(sys.argv[1], sys.argv[2] == "training", int(sys.argv[3]), sys.argv[4:]))
