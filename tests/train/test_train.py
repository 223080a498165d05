"""Runs from the command line: what a run folder holds, when checkpoints are written, which mistakes are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from model.alexnet import AlexNet
from tests.conftest import TinySet
from tests.helpers.checkpoints import disk_full
from tests.helpers.runs import PAIR, finish, here, inside, launch, lines, pair, same, watch, weights
from train.checkpoint import checkpoint
from train.evaluate.__main__ import main as evaluate_main
from train.recipe import load
from train.report.runs import read_run
from train.run_folder import hold


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbed."""
    runs = tmp_path_factory.mktemp("runs")
    out, err = here(recipe, runs)
    assert "76 images of 6 classes, 3 epochs, 29 steps of 8, on cpu" in out and "test on val, 24 images, 10 crops:\n" in out
    assert out.count("WARNING: sample ") == 1 and out.count("until then others stand in for it") == 1  # the one planted
    assert [line.split()[5:7] for line in out.splitlines() if "in quarantine:" in line] == [["1,", "1"]]
    return runs / "small"


def test_run_folder_holds_everything(whole: Path, tiny_set: TinySet) -> None:
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "versions.jsonl", "metrics.jsonl", "checkpoints",
                                                       "quarantine.jsonl", ".lock"}
    version = json.loads((whole / "versions.jsonl").read_text(encoding="utf-8"))
    header = json.loads((tiny_set.index / "index.json").read_text(encoding="utf-8"))
    assert version["torch"] == torch.__version__.split("+")[0] or version["torch"] == torch.__version__
    assert version["dali"] and version["numpy"] and version["python"] and "git" in version
    assert version["index"] == header["sha256"] and len(version["stats"]) == 64 and version["resumed_at"] == 0
    metrics = list(lines(whole))
    assert [line["step"] for line in metrics if line["kind"] == "step"] == list(range(29))
    assert [line["epoch"] for line in metrics if line["kind"] == "epoch"] == [0, 1, 2]
    assert metrics[-1]["kind"] == "test" and metrics[-1]["images"] == 24
    epoch = [line for line in metrics if line["kind"] == "epoch"][-1]
    steps = [line for line in metrics if line["kind"] == "step" and line["epoch"] == 2]
    assert epoch["loss"] == pytest.approx(sum(line["loss"] for line in steps) / len(steps))
    assert epoch["error"] == pytest.approx(sum(line["error"] for line in steps) / len(steps))
    assert len({line["lr"] for line in metrics if line["kind"] == "step"}) > 1, "the plateau should have dropped the rate"
    assert len(checkpoint.checkpoints(whole / "checkpoints")) in (2, 3)


def test_data_wait_is_logged(whole: Path) -> None:
    for text in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] in ("step", "epoch"):
            assert set(line["waited_for"]) == {"read", "decode", "colour", "copy"}
            assert all(0 <= share <= 1 for share in line["waited_for"].values()) and 0 <= line["waited"] <= 1


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


def test_a_finished_run_is_extended_as_if_it_had_been_planned_so(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Weights and metrics to the bit; what changed is said, noted, and in the report."""
    here(recipe, tmp_path, "--train.epochs=2", "--machine.checkpoint_steps=7")
    out, _ = here(recipe, tmp_path, "--resume", "--machine.metrics_steps=1")
    assert "changed from step 19 on: machine.checkpoint_steps: 7 -> 0\nchanged from step 19 on: train.epochs: 2 -> 3\n" in out
    same(whole, tmp_path / "small")
    noted = json.loads((tmp_path / "small/history.jsonl").read_text(encoding="utf-8"))
    assert (noted["step"], noted["epoch"]) == (19, 2)
    assert noted["changes"] == {"machine.checkpoint_steps": [7, 0], "train.epochs": [2, 3]}
    assert load(tmp_path / "small/config.yaml").train.epochs == 3
    assert '"kind": "test"' in (tmp_path / "small/metrics-replaced.jsonl").read_text(encoding="utf-8")
    run = read_run(tmp_path / "small")
    assert (run.state, run.problems) == ("tested", ()) and run.extended == ("train.epochs 2 → 3 from step 19 on",)


def test_written_by_two_resumed_by_one_and_the_reverse(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Sums of floats are in another order in two processes, so the weights agree closely, not to the bit."""
    stop = "--machine.stop_after=13"
    for first, second, name in ((pair, here, "by_two"), (here, pair, "by_one")):
        out, err = first(recipe, tmp_path, f"--machine.name={name}", stop, code=75)
        assert "stopped and saved at step 13; resume with --resume" in out and out.count("stopped and saved") == 1
        second(recipe, tmp_path, f"--machine.name={name}", "--resume")
        found = weights(tmp_path / name)
        for key, value in weights(whole).items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert [line["step"] for line in lines(tmp_path / name) if line["kind"] == "step"] == list(range(29))


def test_damaged_checkpoint_is_passed_over_loudly(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Two damaged ones of later steps lie there, as many as are kept: what is saved after a resume stays, and is resumed."""
    root = tmp_path / "small" / "checkpoints"
    here(recipe, tmp_path, "--machine.stop_after=6", "--machine.checkpoint_steps=2", "--machine.keep_last=9", code=75)
    (root / "step-000000004" / "stats.npz").write_bytes(b"damaged")
    data = bytearray((root / "step-000000006" / "__0_0.distcp").read_bytes())
    data[1000] ^= 4
    (root / "step-000000006" / "__0_0.distcp").write_bytes(data)
    out, _ = here(recipe, tmp_path, "--resume", "--machine.stop_after=3", code=75)
    assert f"WARNING: checkpoint file (={root}/step-000000006/__0_0.distcp) has SHA-256" in out
    assert "step-000000002 at step 2" in out and "is now damaged-step-000000004" in out and "is now damaged-step-000000006" in out
    assert [path.name for path in checkpoint.checkpoints(root)] == ["step-000000002", "step-000000003"]
    out, _ = here(recipe, tmp_path, "--resume")
    assert "step-000000003 at step 3" in out and "WARNING: checkpoint" not in out
    assert {path.name for path in root.glob("damaged-*")} == {"damaged-step-000000004", "damaged-step-000000006"}
    same(whole, tmp_path / "small")
    for path in checkpoint.checkpoints(root):
        (path / "manifest.json").unlink()
    _, err = here(recipe, tmp_path, "--resume", code=4)
    assert "are damaged, all" in err and "Traceback" not in err


@pytest.mark.parametrize("step", ["save", "write_manifest"])
def test_a_resume_before_the_first_checkpoint_starts_over(recipe: Path, whole: Path, tmp_path: Path, step: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had written is kept: no checkpoint vouches for it."""
    with monkeypatch.context() as patch:
        patch.setattr(f"train.checkpoint.checkpoint.{step}", disk_full)
        here(recipe, tmp_path, "--machine.stop_after=3", code=4)
    written = (tmp_path / "small/metrics.jsonl").read_bytes()
    out, _ = here(recipe, tmp_path, "--resume")
    assert "has no checkpoint yet; starting from step 0" in out and written.count(b"\n") == 3
    assert (tmp_path / "small/metrics-replaced.jsonl").read_bytes() == written
    same(whole, tmp_path / "small")


def test_checkpoints_that_cannot_be_seen_are_not_none(recipe: Path, tmp_path: Path) -> None:
    """An empty mount point, a link that leads nowhere, a folder that is gone: training and tests refuse, nothing is cut."""
    here(recipe, tmp_path, "--machine.stop_after=3", code=75)
    root, elsewhere = tmp_path / "small/checkpoints", tmp_path / "elsewhere"
    before = (tmp_path / "small/metrics.jsonl").read_bytes()
    root.rename(elsewhere)

    def refuse(message: str) -> None:
        for _, err in (here(recipe, tmp_path, "--resume", code=4), inside(evaluate_main, ["--run", str(tmp_path / "small")], 4)):
            assert message in err and err.count("\n") == 1, err
        assert (tmp_path / "small/metrics.jsonl").read_bytes() == before

    refuse(f"(={root}) is not there; correct the name, ")
    root.symlink_to(tmp_path / "nowhere")
    refuse(f"(={root}) is not there; correct the name, ")
    root.unlink()
    root.mkdir()
    refuse(f"checkpoints (={root}) holds none, but metrics.jsonl has steps up to 2; mount them, or put them back, or start")
    root.rmdir()
    root.symlink_to(elsewhere)
    assert "at step 3\n" in here(recipe, tmp_path, "--resume", "--machine.stop_after=4", code=75)[0]


def test_a_second_trainer_on_the_same_run_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    here(recipe, tmp_path, "--machine.stop_after=3", code=75)
    with hold(tmp_path / "small"):
        _, err = here(recipe, tmp_path, "--resume", code=2)
        assert re.match(rf"error: run folder \(={tmp_path}/small\) is in use by pid {os.getpid()} on \S+ since \d+-\d+-\d+ "
                        r"\d+:\d+:\d+; wait until that has ended, or give another --machine.name\n$", err), err
        inside(evaluate_main, ["--run", str(tmp_path / "small"), "--views", "1"], 0)  # may read meanwhile
    here(recipe, tmp_path, "--resume", "--machine.stop_after=4", code=75)


@pytest.mark.parametrize("gone", ["small", "small/metrics.jsonl"])
def test_a_run_folder_removed_while_training_is_said(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     gone: str) -> None:
    steps: list[int] = []

    def step(*given: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            (tmp_path / gone).rename(tmp_path / "x")

    def look(network: AlexNet) -> None:
        network.register_forward_hook(step)

    with monkeypatch.context() as patch:
        watch(patch, look)
        _, err = here(recipe, tmp_path, code=4)
    assert f"error: run folder (={tmp_path}/small) was removed, moved or replaced while training" in err and len(steps) < 9


def test_mistakes_leave_with_2_and_no_traceback(recipe: Path, whole: Path, tiny_set: TinySet, tmp_path: Path) -> None:
    runs = whole.parent
    for argv, message in [
        ((), rf"error: run folder (={whole}) already holds a run; resume it with --resume, or give another --machine.name"),
        (("--resume", "--train.seed=7", "--optimizer.lr=0.02", "--machine.threads=2"),
         f"recipe (=optimizer.lr: 0.01 in the run, 0.02 now; train.seed: 1 in the run, 7 now) is not the one of {whole}; a "
         "resume may raise train.epochs, change schedule.milestones of epochs to come, and the groups machine and parallel"),
        (("--resume", "--train.epochs=2"), "train.epochs (=2) is less than the 3 epochs that the run has begun; give "
         "--train.epochs=3 or more"),
        (("--resume", "--machine.name=none"), f"run folder (={runs}/none) holds no run to resume; start it without"),
        (("--machine.name=a/b",), "machine.name (=a/b) must name a folder of"),
        (("--model.classes=5", "--machine.name=x"), "model.classes (=5) must be at least the 6 of the index"),
        (("--data.test_split=test", "--machine.name=x"), "split (=test) is not in the index"),
        (("--train.batch=1000", "--machine.name=x"), "train.batch (=1000) must not exceed the 76 images of split train"),
        (("--optimizer.lrr=1",), "--optimizer.lrr (=1) is no option; did you mean --optimizer.lr?"),
    ]:
        out, err = here(recipe, runs, *argv, code=2)
        assert message in err and "Traceback" not in err and err.count("\n") == 1, err
    assert not (runs / "x").exists()
    config = whole / "config.yaml"
    kept = config.read_text()
    try:
        config.write_text(kept.replace("lr: 0.01", "lr: 0.11"))
        _, err = here(recipe, runs, "--resume", code=2)
    finally:
        config.write_text(kept)
    assert (f"recipe (=optimizer.lr: 0.11 in the run, 0.01 now) is not the one of {whole} (config.yaml there has changed since "
            "the last start: copy that of its newest checkpoint)") in err


def test_evaluate_from_the_command_line(recipe: Path, whole: Path) -> None:
    tested = list(lines(whole))[-1]

    def evaluate(*argv: str, code: int = 0) -> tuple[str, str]:
        return inside(evaluate_main, list(argv), code)

    out, _ = evaluate("--run", str(whole))
    assert f"\nerr@1 {tested['top1']:.2%} ({tested['top1_errors']}/24), 95% interval " in out and "split val: 24 images\n" in out
    last = checkpoint.checkpoints(whole / "checkpoints")[-1]
    both = json.loads(finish(launch([*PAIR, "train.evaluate", "--checkpoint", str(last), "--json"]))[0])
    assert (both["top1_errors"], both["top5_errors"]) == (tested["top1_errors"], tested["top5_errors"])
    assert both["loss"] == pytest.approx(tested["loss"], rel=1e-6)
    best = json.loads(evaluate("--run", str(whole), "--which", "best", "--views", "1", "--json")[0])
    epochs = [line["validation"]["top1"] for line in lines(whole) if line["kind"] == "epoch"]
    assert best["top1"] == min(epochs)
