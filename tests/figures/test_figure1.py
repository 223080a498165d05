"""Figure 1: epochs to a training error, the best rate of each group, the comparison, the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import pytest
from PIL import Image

from tests.helpers.figures import show
from tests.helpers.recipes import TEXT
from tools.show.figure1 import Curve, read_curve, read_groups, summary

SLOW = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def curve(*errors: float, lr: float = 0.1) -> Curve:
    return Curve("x", lr, errors, 1.0)


def write(runs: Path, name: str, lr: float, errors: Sequence[float], cut: str = "") -> Path:
    """A run folder as train.main leaves it, so far as the figure reads it; `cut`: what stands behind the last whole line."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(TEXT.replace("lr: 1e-2", f"lr: {lr}"), encoding="utf-8")
    lines = [{"kind": "step", "time": 0.0, "step": 0, "error": 0.01}]
    lines += [{"kind": "epoch", "time": 0.0, "epoch": epoch, "error": error, "seconds": 30.0}
              for epoch, error in enumerate(errors)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut, encoding="utf-8")
    return folder


def command(runs: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert show("figure1", "--runs", runs, *words) == code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """ReLU at its best 2.5 epochs, tanh 5.5; a rate too high that diverged within the first epoch."""
    write(tmp_path, "relu-s1-lr0.1", 0.1, (0.6, 0.3, 0.2, 0.1))
    write(tmp_path, "relu-s1-lr0.01", 0.01, SLOW)
    write(tmp_path, "relu-s1-lr9", 9, ())
    write(tmp_path, "tanh-s1-lr0.1", 0.1, SLOW)
    write(tmp_path, "tanh-s1-lr0.01", 0.01, (0.7, 0.65, 0.6, 0.55))
    return tmp_path


# --- curves

def test_epochs_are_interpolated() -> None:
    assert curve(0.6, 0.3, 0.2).epochs_to(0.25) == pytest.approx(2.5)
    assert curve(0.6, 0.4, 0.2).epochs_to(0.25) == pytest.approx(2.75)
    assert curve(0.6, 0.25).epochs_to(0.25) == 2, "reached is reached"
    assert curve(0.6, 0.3, 0.3, 0.3, 0.1).epochs_to(0.25) == pytest.approx(4.25)


def test_first_of_several_crossings_counts() -> None:
    assert curve(0.5, 0.2, 0.5, 0.2).epochs_to(0.25) == pytest.approx(1 + 0.25 / 0.3)


def test_within_the_first_epoch_and_never() -> None:
    assert curve(0.2, 0.1).epochs_to(0.25) == 1 and curve(0.25).epochs_to(0.25) == 1
    assert curve(0.6, 0.5, 0.26).epochs_to(0.25) is None and curve().epochs_to(0.25) is None
    assert curve(0.6, 0.26, 0.3).lowest == 0.26 and curve().lowest == float("inf")


def test_a_run_folder(tmp_path: Path) -> None:
    """The error of whole epochs, from a run under way too: its last line may be half there."""
    found = read_curve(write(tmp_path, "relu-s1", 0.02, (0.6, 0.3), cut='{"kind": "epoch", "time": 1.0, "err'))
    assert found == Curve("relu-s1", 0.02, (0.6, 0.3), 1.0)
    (tmp_path / "relu-s1" / "metrics.jsonl").unlink()
    assert read_curve(tmp_path / "relu-s1").errors == ()


# --- choice and comparison

def test_the_best_of_each_group_comes_first(study: Path) -> None:
    groups = read_groups(study, 0.25)
    assert [found.lr for found in groups["relu"]] == [0.1, 0.01, 9] and [found.lr for found in groups["tanh"]] == [0.1, 0.01]
    assert [found.lr for found in read_groups(study, 0.05)["relu"]] == [0.1, 0.01, 9], "none gets there: the lowest"


def test_the_summary(study: Path) -> None:
    found: dict[str, Any] = summary(read_groups(study, 0.25), 0.25)
    assert found["ratio"] == pytest.approx(5.5 / 2.5) and found["at_least"] is None and found["target"] == 0.25
    assert found["best"]["relu"] == {"run": "relu-s1-lr0.1", "lr": 0.1, "epochs": pytest.approx(2.5), "minutes": 2.0,
                                     "errors": [0.6, 0.3, 0.2, 0.1]}
    assert found["search"]["relu"] == [{"lr": 0.01, "epochs": pytest.approx(5.5), "lowest": 0.2},
                                       {"lr": 0.1, "epochs": pytest.approx(2.5), "lowest": 0.1},
                                       {"lr": 9.0, "epochs": None, "lowest": None}]
    assert found["search"]["tanh"][0] == {"lr": 0.01, "epochs": None, "lowest": 0.55}


@pytest.mark.parametrize(("relu", "tanh", "ratio", "at_least"), [
    ((0.6, 0.3, 0.2), SLOW, 5.5 / 2.5, None),
    ((0.2,), (0.6, 0.3, 0.2), 2.5, None),
    ((0.6, 0.3, 0.2), SLOW[:5], None, 5 / 2.5),        # tanh was stopped: so much sooner at least
    (SLOW, (0.6, 0.5), None, None),                    # too soon to say anything
    (SLOW[:3], SLOW, None, None),                      # it is ReLU that never gets there
    (SLOW[:3], SLOW[:3], None, None),
])
def test_ratio_and_at_least(relu: tuple[float, ...], tanh: tuple[float, ...], ratio: float | None,
                            at_least: float | None) -> None:
    found = summary({"relu": [curve(*relu)], "tanh": [curve(*tanh)]}, 0.25)
    for key, value in (("ratio", ratio), ("at_least", at_least)):
        assert found[key] == (None if value is None else pytest.approx(value)), key


# --- the command

def test_text(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = command(study, capsys)
    assert out.splitlines() == [
        "relu  lr 0.1        2.5 epochs to 25%, 4 epochs in 2.0 minutes",
        "relu  lr 0.01       5.5 epochs to 25%, 6 epochs in 3.0 minutes",
        "relu  lr 9        no whole epoch: it diverged, or has just begun",
        "tanh  lr 0.1        5.5 epochs to 25%, 6 epochs in 3.0 minutes",
        "tanh  lr 0.01     never at 25%, lowest 55.0%, 4 epochs in 2.0 minutes",
        "ReLU gets there 2.2 times sooner (paper: about 6)"]
    out, _ = command(study, capsys, "--target", "0.15")
    assert out.endswith("ReLU gets there more than 1.7 times sooner: tanh had not when it stopped (paper: about 6)\n")
    out, _ = command(study, capsys, "--target", "0.05")
    assert "sooner" not in out and "never at 5%, lowest 10.0%" in out


def test_json_is_one_object(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = command(study, capsys, "--json")
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads(json.dumps(summary(read_groups(study, 0.25), 0.25)))


@pytest.mark.parametrize("target", ["25", "0", "1", "nan", "-0.1"])
def test_a_target_that_is_no_share(study: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    _, err = command(study, capsys, f"--target={target}", code=2)
    assert err == f"error: --target (={float(target)}) must be a share between 0 and 1; 0.25 is the paper's\n"


def test_a_group_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = "error: runs (={}) hold no {}-… with a whole epoch; run train/recipes/studies/figure1.yaml first\n"
    assert command(tmp_path / "none", capsys, code=2)[1] == wanted.format(tmp_path / "none", "relu")
    write(tmp_path, "relu-s1", 0.1, SLOW)
    write(tmp_path, "tanh-s1", 0.1, ())
    out, err = command(tmp_path, capsys, "--out", str(tmp_path / "f.png"), code=2)
    assert err == wanted.format(tmp_path, "tanh") and not out and not (tmp_path / "f.png").exists()


def test_the_picture(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both colours are there, in a new folder; the run that diverged and one of a single epoch do no harm."""
    write(study, "tanh-s1-lr0.5", 0.5, (0.72,))
    out = tmp_path / "new" / "figure1.png"
    command(study, capsys, "--out", str(out))
    with Image.open(out) as picture:
        pixels = {colour for _, colour in picture.convert("RGB").getcolors(10 ** 6)}
        assert picture.format == "PNG" and min(picture.size) > 500
    assert (0x00, 0x72, 0xb2) in pixels and (0xd5, 0x5e, 0x00) in pixels
