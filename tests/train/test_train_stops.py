"""Runs that are stopped or killed, in one process and in one of two; and that a resume gives the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.disturbed_run import signal_at
from tests.helpers.runs import ALONE, PAIR, finish, here, launch, lines, pair, run, same, start, watch
from train.checkpoint import checkpoint
from train.loop import StopRequest

# 76 images: epochs end after 10, 19 and 29 steps of 8; the rate falls with the second.
RATES = ("--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 1e-3}]", "--machine.test_batch=8")


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    here(recipe, runs, *RATES)
    return runs / "small"


@pytest.fixture(scope="module")
def whole_of_two(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    pair(recipe, runs, *RATES)
    return runs / "small"


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("launcher", [ALONE, pytest.param(PAIR, marks=pytest.mark.slow)],
                         ids=["one process", "two processes"])
def test_killed_at_a_random_step_and_resumed_gives_the_same_bits(recipe: Path, whole: Path, whole_of_two: Path, tmp_path: Path,
                                                                 launcher: list[str]) -> None:
    """kill -9 of all processes. (Two, with their restart: tests/parallel/test_faults.py too.)"""
    words = [*RATES, "--machine.checkpoint_steps=2", "--machine.keep_last=3"]
    seed = random.randrange(10 ** 6)
    print(f"seed {seed}")  # shown when it fails
    choose = random.Random(seed)
    target = choose.randint(1, 18)
    process = start(launcher, recipe, tmp_path, *words)
    while newest_step(tmp_path / "small") < target and process.poll() is None:
        time.sleep(0.005)
    time.sleep(choose.random() * 0.05)
    assert process.poll() is None, "it ended before it could be killed"
    kill_all(process)
    process.communicate(timeout=60)
    out, _ = run(launcher, recipe, tmp_path, *words, "--resume")
    assert f"resuming from {tmp_path}/small/checkpoints/step-" in out
    same(whole if launcher is ALONE else whole_of_two, tmp_path / "small")
    starts = (tmp_path / "small" / "versions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(starts) == 2 and json.loads(starts[-1])["resumed_at"] > 0


def newest_step(folder: Path) -> int:
    found = names(folder)
    return int(found[-1].split("-")[1]) if found else 0


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of the process and its children (of a launcher, the workers)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)


def test_stopped_in_training_and_resumed(recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        watch(patch, lambda network: signal_at(network, True, 4, signal.SIGINT))
        out, _ = here(recipe, tmp_path, *RATES, code=75)
    assert "stopped and saved at step 5; resume with --resume" in out and names(tmp_path / "small") == ["step-000000005"]
    here(recipe, tmp_path, *RATES, "--resume")
    same(whole, tmp_path / "small")


def test_stopped_in_a_validation_twice_and_resumed(recipe: Path, whole: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the epoch is lost, nothing of the next is trained before its validation, and the rates are told right."""
    with monkeypatch.context() as patch:
        watch(patch, lambda network: signal_at(network, False, 4))  # three batches a validation: in the second one
        out, _ = here(recipe, tmp_path, *RATES, code=75)
    step = newest_step(tmp_path / "small")
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


def test_only_a_second_ctrl_c_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    handlers: dict[int, object] = {}
    now = [0.0]
    monkeypatch.setattr("train.loop.os.kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr("train.loop.signal.signal", handlers.__setitem__)
    monkeypatch.setattr("train.loop.time.monotonic", lambda: now[0])
    stop = StopRequest()
    stop.listen()
    assert handlers == dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), stop.handle)
    handlers.clear()
    monkeypatch.setattr("train.loop.signal.getsignal", lambda number: signal.SIG_IGN)
    stop.listen()
    assert handlers == dict.fromkeys((signal.SIGTERM, signal.SIGINT), stop.handle), "nohup"
    for moment, number in ((0.0, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM), (5.0, signal.SIGTERM)):
        now[0] = moment
        stop.handle(number, None)
        assert stop.received and not killed, "torchrun passes the first Ctrl-C on, and then SIGTERM"
    stop.handle(signal.SIGINT, None)
    assert killed == [signal.SIGINT]


def disturbed(*words: str) -> list[str]:
    """The command of a run of two processes, the second of which is disturbed."""
    return [*PAIR, "tests.helpers.disturbed_run", *words, *RATES, "--machine.timeout_s=20"]


def test_a_signal_to_one_of_two_stops_both_at_the_same_step(recipe: Path, whole_of_two: Path, tmp_path: Path) -> None:
    """To the second process: in training, then in a validation; then both resume, and end as if nothing had been."""
    for resume, training, number, expected in (([], "training", 5, "step-000000006"),
                                               (["--resume"], "testing", 1, "step-000000010")):
        out, err = finish(launch(disturbed("signal", training, str(number), "--config", str(recipe),
                                           f"--machine.runs={tmp_path}", *resume)), code=1)
        assert f"stopped and saved at step {int(expected[-9:])};" in out, out + err
        assert out.count("left with 75") == 2, out + err
        assert names(tmp_path / "small")[-1] == expected
        checkpoint.verify(tmp_path / "small/checkpoints" / expected)
    pair(recipe, tmp_path, *RATES, "--resume")
    same(whole_of_two, tmp_path / "small")


def test_a_gradient_that_is_not_finite_in_one_of_two_stops_both(recipe: Path, tmp_path: Path) -> None:
    out, err = finish(launch(disturbed("spoil", "training", "5", "--config", str(recipe), f"--machine.runs={tmp_path}",
                                       "--machine.checkpoint_steps=5", "--machine.sync_steps=4")), code=1)
    assert "norm of the gradient (=nan) of process 1 at step 5 with learning rate 0.01 is not finite" in err, err
    assert out.count("left with 3") == 2 and names(tmp_path / "small")[-1] == "step-000000005", err
