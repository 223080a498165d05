"""Runs from the command line: trained, killed, stopped, resumed, refused; one process and two."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ALONE, PAIR, finish, here, inside, launch, lines, pair, run, same, start, weights
from train.checkpoint import checkpoint
from train.config import ParallelConfig
from train.parallel.topology import _coordinates, process_group
from train.evaluate.__main__ import main as evaluate_main
from train.loop import Stop


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbed."""
    runs = tmp_path_factory.mktemp("runs")
    out, err = here(recipe, runs)
    assert "76 images of 6 classes, 3 epochs, 29 steps of 8, on cpu" in out and "test (val, 24 images, 10 views)" in out
    return runs / "small"


def test_run_folder_holds_everything(whole: Path, tiny_set: TinySet) -> None:
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints",
                                                       "quarantine.jsonl"}
    version = json.loads((whole / "versions.jsonl").read_text(encoding="utf-8"))
    header = json.loads((tiny_set.index / "index.json").read_text(encoding="utf-8"))
    assert version["torch"] == torch.__version__.split("+")[0] or version["torch"] == torch.__version__
    assert version["dali"] and version["numpy"] and version["python"] and "git" in version
    assert version["index"] == header["sha256"] and len(version["stats"]) == 64 and version["resumed_at"] == 0
    told = list(lines(whole))
    assert [line["step"] for line in told if line["kind"] == "step"] == list(range(29))
    assert [line["epoch"] for line in told if line["kind"] == "epoch"] == [0, 1, 2]
    assert told[-1]["kind"] == "test" and told[-1]["images"] == 24
    epoch = [line for line in told if line["kind"] == "epoch"][-1]
    steps = [line for line in told if line["kind"] == "step" and line["epoch"] == 2]
    assert epoch["loss"] == pytest.approx(sum(line["loss"] for line in steps) / len(steps))
    assert epoch["error"] == pytest.approx(sum(line["error"] for line in steps) / len(steps))
    assert len({line["lr"] for line in told if line["kind"] == "step"}) > 1, "the plateau should have dropped the rate"
    assert len(checkpoint.checkpoints(whole / "checkpoints")) in (2, 3)


@pytest.mark.parametrize("launcher", [ALONE, PAIR], ids=["one process", "two processes"])
def test_killed_at_random_steps_and_resumed_gives_the_same_bits(recipe: Path, whole: Path, tmp_path: Path,
                                                                launcher: list[str]) -> None:
    """kill -9 three times, whenever a random step has been reached, then left alone."""
    if launcher is PAIR:
        run(PAIR, recipe, tmp_path, "--machine.name=whole")
        whole = tmp_path / "whole"
    often = ["--machine.name=killed", "--machine.checkpoint_steps=2", "--machine.keep_last=3"]
    seed = random.randrange(10 ** 6)
    print(f"seed {seed}")  # shown when it fails
    choose = random.Random(seed)
    kills = 3 if launcher is ALONE else 1
    killed = 0
    for attempt in range(kills):
        # beyond what the one before had saved when it was killed, so that each of them gets to train
        target = newest_step(tmp_path / "killed") + choose.randint(1, 18 // kills)
        process = start(launcher, recipe, tmp_path, *often, *(["--resume"] if attempt else []))
        while newest_step(tmp_path / "killed") < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(choose.random() * 0.05)
        if process.poll() is None:
            kill_all(process)
            killed += 1
        process.communicate(timeout=60)
    assert killed, "it ended before it could be killed"
    out, _ = run(launcher, recipe, tmp_path, *often, "--resume")
    assert f"resuming from {tmp_path}/killed/checkpoints/step-" in out
    same(whole, tmp_path / "killed")
    starts = (tmp_path / "killed" / "versions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(starts) == kills + 1 and json.loads(starts[-1])["resumed_at"] > 0


def newest_step(folder: Path) -> int:
    found = checkpoint.checkpoints(folder / "checkpoints")
    return int(found[-1].name.split("-")[1]) if found else 0


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 of the process and its children (of a launcher, the workers)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)


def test_checkpoints_every_so_many_epochs_and_steps(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A step that ends an epoch counts as any other, though its checkpoint is written after the validation."""
    for name, words, expected in (("epochs", [], ["19-epoch-0002", "29-epoch-0003"]),
                                  ("steps", ["--machine.checkpoint_steps=5"],
                                   ["05", "10-epoch-0001", "15", "19-epoch-0002", "20", "25", "29-epoch-0003"])):
        words = [*words, f"--machine.name={name}", "--machine.checkpoint_epochs=2", "--machine.keep_last=99"]
        here(recipe, tmp_path, *words)
        found = checkpoint.checkpoints(tmp_path / name / "checkpoints")
        assert [path.name.removeprefix("step-0000000") for path in found] == expected
        for path in found[2 if name == "steps" else 1:]:  # as if killed after an epoch that left none, or within one
            shutil.rmtree(path)
        here(recipe, tmp_path, *words, "--resume")
        same(whole, tmp_path / name)


def test_written_by_two_resumed_by_one_and_the_reverse(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Sums of floats are in another order in two processes, so the weights agree closely, not to the bit."""
    stop = "--machine.stop_after=13"
    for first, second, name in ((pair, here, "by_two"), (here, pair, "by_one")):
        out, err = first(recipe, tmp_path, f"--machine.name={name}", stop, code=75)
        assert "stopped and saved at step 13; go on with --resume" in out and out.count("stopped and saved") == 1
        second(recipe, tmp_path, f"--machine.name={name}", "--resume")
        found = weights(tmp_path / name)
        for key, value in weights(whole).items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert [line["step"] for line in lines(tmp_path / name) if line["kind"] == "step"] == list(range(29))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves_with_its_own_code(recipe: Path, whole: Path, tmp_path: Path, number: int) -> None:
    def send() -> None:
        while newest_step(tmp_path / "small") < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    out, _ = here(recipe, tmp_path, "--machine.checkpoint_steps=1", code=75)
    sender.join()
    assert "stopped and saved at step" in out and newest_step(tmp_path / "small") < 29
    here(recipe, tmp_path, "--resume")
    same(whole, tmp_path / "small")


def test_only_a_second_ctrl_c_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    now = [0.0]
    monkeypatch.setattr("train.loop.os.kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr("train.loop.signal.signal", lambda number, handler: None)
    monkeypatch.setattr("train.loop.time.monotonic", lambda: now[0])
    stop = Stop()
    for moment, number in ((0.0, signal.SIGINT), (0.2, signal.SIGINT), (0.3, signal.SIGTERM), (5.0, signal.SIGTERM)):
        now[0] = moment
        stop._hear(number, None)
        assert stop.wanted and not killed, "torchrun passes the first Ctrl-C on, and then SIGTERM"
    stop._hear(signal.SIGINT, None)
    assert killed == [signal.SIGINT]


def test_damaged_checkpoint_is_passed_over_loudly(recipe: Path, whole: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--machine.stop_after=15", "--machine.checkpoint_steps=4", "--machine.keep_last=9",
         code=75)
    newest = checkpoint.checkpoints(tmp_path / "small" / "checkpoints")[-1]
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[1000] ^= 4
    (newest / "__0_0.distcp").write_bytes(data)
    out, _ = here(recipe, tmp_path, "--resume")
    assert f"WARNING: checkpoint file (={newest}/__0_0.distcp) has SHA-256" in out and "step-000000012 at step 12" in out
    same(whole, tmp_path / "small")
    for path in checkpoint.checkpoints(tmp_path / "small" / "checkpoints"):
        (path / "manifest.json").unlink()
    _, err = here(recipe, tmp_path, "--resume", code=4)
    assert "are damaged, all" in err and "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_before_the_update(recipe: Path, tmp_path: Path) -> None:
    _, err = here(recipe, tmp_path, "--optimizer.lr=1e30", "--machine.checkpoint_steps=1", code=3)
    assert "error: loss (=nan) at step" in err and "with learning rate 1e+30 is not finite; the update was not made" in err
    assert "Traceback" not in err


def test_resume_of_a_run_without_checkpoint_starts_over(recipe: Path, whole: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--machine.stop_after=3", code=75)
    for path in checkpoint.checkpoints(tmp_path / "small" / "checkpoints"):
        checkpoint.shutil.rmtree(path)
    out, _ = here(recipe, tmp_path, "--resume")
    assert "has no checkpoint yet; starting from step 0" in out
    same(whole, tmp_path / "small")


def test_mistakes_leave_with_2_and_no_traceback(recipe: Path, whole: Path, tiny_set: TinySet, tmp_path: Path) -> None:
    runs = whole.parent
    for argv, message in [
        ((), rf"error: run folder (={whole}) already holds a run; go on with --resume, or give another --machine.name"),
        (("--resume", "--train.seed=7"), "train.seed: 1 -> 7; resume with the same recipe"),
        (("--resume", "--machine.name=none"), f"run folder (={runs}/none) holds no run to resume; start it without"),
        (("--machine.name=a/b",), "machine.name (=a/b) must name a folder of"),
        (("--model.classes=5", "--machine.name=x"), "model.classes (=5) must be at least the 6 of the index"),
        (("--data.test_split=test", "--machine.name=x"), "split (=test) is not in the index"),
        (("--train.batch=1000", "--machine.name=x"), "batch (=1000) must not exceed the 76 samples"),
        (("--optimizer.lrr=1",), "unrecognized arguments: --optimizer.lrr=1"),
    ]:
        out, err = here(recipe, runs, *argv, code=2)
        assert message in err and "Traceback" not in err and err.count("\n") == 1, err
    assert not (runs / "x").exists()


def test_evaluate_from_the_command_line(recipe: Path, whole: Path) -> None:
    tested = list(lines(whole))[-1]

    def evaluate(*argv: str, code: int = 0) -> tuple[str, str]:
        return inside(evaluate_main, list(argv), code)

    out, _ = evaluate("--run", str(whole))
    assert f"top-1 errors {tested['top1_errors']} of 24 = " in out and "split val: 24 images, 10 crops each" in out
    last = checkpoint.checkpoints(whole / "checkpoints")[-1]
    both = json.loads(finish(launch([*PAIR, "train.evaluate", "--checkpoint", str(last), "--json"]))[0])
    assert (both["top1_errors"], both["top5_errors"]) == (tested["top1_errors"], tested["top5_errors"])
    assert both["loss"] == pytest.approx(tested["loss"], rel=1e-6)
    best = json.loads(evaluate("--run", str(whole), "--which", "best", "--views", "1", "--json")[0])
    epochs = [line["validation"]["top1"] for line in lines(whole) if line["kind"] == "epoch"]
    assert best["top1"] == min(epochs)


def test_two_runs_in_bf16_and_channels_last_finish(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--machine.precision=bf16", "--machine.channels_last=true", "--train.epochs=1")
    losses = [line["loss"] for line in lines(tmp_path / "small") if line["kind"] == "step"]
    assert len(losses) == 10 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("variables, towers, parallel, device, message", [
    ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, 2, {"towers": 2}, "cpu", r"processes \(=3\) must be even in number"),
    ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}, 2, {}, "cpu", r"processes of this machine \(=3\) must be even in number"),
    ({"WORLD_SIZE": "2"}, 1, {"towers": 2}, "cpu", r"model.towers \(=1\) must be 2 for two processes to hold a tower each"),
    ({"WORLD_SIZE": "2"}, 1, {"scheme": "weird"}, "cpu",
     r"model.towers \(=1\) must be 2 .*; use --parallel.towers=1 --parallel.scheme=towers"),
    ({"WORLD_SIZE": "1"}, 2, {}, "cuda", r"machine.device \(=cuda\) needs a GPU for local process 0, but there are 0"),
])
def test_topologies_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], towers: int,
                                       parallel: dict[str, Any], device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, RuntimeError), match=message):
        with process_group(towers=towers, device=device, timeout_s=5, parallel=ParallelConfig(**parallel)):
            pass


@pytest.mark.parametrize("world, towers, parallel, places", [
    (1, 2, {"towers": 2}, [(0, 1, 0, 1)]),
    (2, 2, {}, [(0, 1, 0, 2), (0, 1, 1, 2)]),
    (2, 1, {}, [(0, 2, 0, 1), (1, 2, 0, 1)]),
    (3, 2, {}, [(0, 3, 0, 1), (1, 3, 0, 1), (2, 3, 0, 1)]),
    (4, 2, {}, [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]),
    (4, 2, {"towers": 1}, [(rank, 4, 0, 1) for rank in range(4)]),
    (2, 2, {"scheme": "weird"}, [(0, 1, 0, 2), (0, 1, 1, 2)]),
])
def test_towers_of_a_pair_are_neighbours(world: int, towers: int, parallel: dict[str, Any],
                                         places: list[tuple[int, ...]]) -> None:
    assert [_coordinates(world, rank, world, towers, ParallelConfig(**parallel)) for rank in range(world)] == places


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"environment \(=WORLD_SIZE\) lacks .*RANK.*; start with torchrun, or unset"):
        with process_group(towers=2, device="cpu", timeout_s=5):
            pass
