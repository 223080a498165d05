"""The command: tested or found saved, alone and together, in one process and two; where it saves; mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.files import is_temporary
from tests.conftest import TinySet
from tests.helpers.evaluations import evaluate, evaluate_json
from tests.helpers.runs import PAIR, finish, inside, launch
from tests.helpers.trained_run import write_run
from train.checkpoint import checkpoint
from train.evaluate import command, predictions
from train.evaluate.__main__ import main
from train.export import __main__ as export, safetensors_io as weights
from train.recipe import load


@pytest.fixture(scope="module")
def runs(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, with other seeds, a and b."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        write_run(folder, tiny_set, name=name, seed=seed, test_views="  test_views: 1")
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The runs, to be written into."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("evaluation", "tested", "checkpoint")}


def test_ctrl_c_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.delattr(sys.modules["train.evaluate"], "command")
    monkeypatch.delitem(sys.modules, "train.evaluate.command")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=interrupt)])
    assert main(["--run", "."]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_saved_equals_live(copy: Path) -> None:
    both = ("--checkpoints", copy / "a", copy / "b")
    live = evaluate_json(*both, "--save", copy / "live")
    assert not (copy / "a/evaluations").exists()
    first = evaluate_json(*both)
    assert [entry["tested"] for entry in first["members"]] == [24, 24]
    folders = [Path(entry["evaluation"]) for entry in first["members"]]
    assert folders[0].parent == copy / "a/evaluations" and folders[0].name.endswith("-val-1view")
    again = evaluate_json(*both)
    assert [entry["tested"] for entry in again["members"]] == [0, 0]
    for name in "ab":  # neither checkpoints, nor recipes
        shutil.rmtree(copy / name / "checkpoints")
    from_files = evaluate_json("--checkpoints", *folders)
    for other in first, again, from_files:
        assert other["ensemble"] == live["ensemble"]
        assert [figures(entry) for entry in other["members"]] == [figures(entry) for entry in live["members"]]
    assert evaluate_json("--checkpoints", *folders[::-1])["ensemble"] == live["ensemble"]


def test_a_person_reads_what_came_of_it(copy: Path) -> None:
    out, err = evaluate("--run", copy / "a", copy / "b")
    found = evaluate_json("--run", copy / "a", copy / "b")
    assert out.startswith(f"split val: 24 images\n{copy}/a/checkpoints/step-") and ", 1 crop\n" in out
    for entry in (*found["members"], found["ensemble"]):
        low, high = entry["intervals"]["top1"]
        assert f"\nerr@1 {entry['top1']:.2%} ({entry['top1_errors']}/24), 95% interval {low:.2%} to {high:.2%}\n" in out
        assert f"\nloss {entry['loss']:.4f}, 95% interval " in out
    assert "err@5" not in out  # of 6 classes
    assert "\nensemble of 2, probabilities averaged\n" in out
    assert f"\nsaved in {copy}/a/evaluations/step-" in out
    chance = [entry for entry in (*found["members"], found["ensemble"]) if entry["top1_errors"] >= 15]  # 9 right may be luck
    assert err.count("top-1 error is at chance") == len(chance) > 0
    assert f"\nno image was read: as saved in {copy}/a/evaluations" in evaluate("--run", copy / "a", copy / "b")[0]


def test_a_test_that_is_cut_off_starts_again(runs: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_json("--run", runs / "a", "--batch", 4, "--save", copy / "whole")
    whole, saving = command.predict, []

    def cut(*args: Any, **options: Any) -> None:
        whole(*args, **options)
        saving.extend((copy / "a/evaluations").iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "predict", cut)
        assert evaluate("--run", copy / "a", "--batch", 4, code=130)[1] == "interrupted\n"
    assert len(saving) == 1 and is_temporary(saving[0]) and not list((copy / "a/evaluations").iterdir())
    again = evaluate_json("--run", copy / "a", "--batch", 4)
    assert again["tested"] == 24 and figures(again["members"][0]) == figures(expected["members"][0]), "to the bit"


def test_two_processes_give_the_same(runs: Path, copy: Path) -> None:
    words = [*PAIR, "train.evaluate", "--json", "--checkpoints", str(copy / "a"), str(copy / "b")]
    both = json.loads(finish(launch(words))[0])
    expected = evaluate_json("--checkpoints", runs / "a", runs / "b", "--save", copy / "one")
    assert both["ensemble"] == expected["ensemble"] and [entry["tested"] for entry in both["members"]] == [24, 24]
    again = evaluate_json("--checkpoints", *(entry["evaluation"] for entry in both["members"]))
    assert again["ensemble"] == expected["ensemble"]


def test_where_it_is_saved(copy: Path, tmp_path: Path) -> None:
    found = evaluate_json("--run", copy / "a", "--save", tmp_path / "kept")
    step = checkpoint.checkpoints(copy / "a/checkpoints")[-1].name
    assert found["evaluation"] == str(tmp_path / f"kept/a-{step}-val-1view") and not (copy / "a/evaluations").exists()
    (tmp_path / "file").write_text("")
    _, err = evaluate("--run", copy / "a", "--save", tmp_path / "file", code=4)
    assert f"evaluation (={tmp_path}/file/a-{step}-val-1view) could not be written: " in err


def test_it_has_names_and_its_place_wherever_one_stands(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = checkpoint.checkpoints(copy / "a/checkpoints")[-1].name
    monkeypatch.chdir(copy / "a/checkpoints")
    assert evaluate_json("--checkpoint", step)["evaluation"] == str(copy / f"a/evaluations/{step}-val-1view")
    monkeypatch.chdir(copy / "a")
    assert evaluate_json("--run", ".", "--save", tmp_path / "kept")["evaluation"] == str(tmp_path / f"kept/a-{step}-val-1view")
    assert sorted(path.name for path in (copy / "a/checkpoints").iterdir()) == [step]


@pytest.fixture
def exported(copy: Path, tmp_path: Path) -> Path:
    """Run a's network as train.export writes it."""
    inside(export.main, [str(copy / "a"), "--out", str(tmp_path / "weights/a"), "--which", "last"], 0)
    return tmp_path / "weights/a"


def test_an_exported_folder_is_tested_as_its_checkpoint(copy: Path, exported: Path, tiny_set: TinySet) -> None:
    index = ("--index", tiny_set.index)
    found = evaluate_json("--checkpoint", exported, *index)
    assert figures(found) == {**figures(evaluate_json("--run", copy / "a")), "members": found["members"]}
    assert found["evaluation"] == str(exported.parent / "evaluations/a-val-1view") and found["tested"] == 24
    assert evaluate_json("--checkpoint", exported, *index)["tested"] == 0
    both = evaluate_json("--checkpoints", exported, copy / "b", *index)
    assert both["ensemble"] == evaluate_json("--checkpoints", copy / "a", copy / "b")["ensemble"]
    _, err = evaluate("--checkpoint", exported, code=2)
    assert "index (=index) that" in err and "of its place only the name was exported; give it with --index\n" in err
    with (exported / weights.WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert "model.safetensors) has SHA-256" in evaluate("--checkpoint", exported, *index, code=4)[1]


@pytest.mark.parametrize("said, code, message", [
    ({}, 0, "do not say which classes theirs are; they are taken to be those of "),
    ({"classes_sha256": "0" * 64}, 2, "has other classes, or another order of them, than the one the network was trained on")])
def test_classes_of_an_exported_folder(exported: Path, tiny_set: TinySet, said: dict[str, str], code: int, message: str) -> None:
    _, tensors = weights.load_safetensors(exported)
    (exported / weights.WEIGHTS).write_bytes(weights.pack(load(exported / "config.yaml"), tensors, said))
    weights.write_manifest(exported)
    assert message in evaluate("--checkpoint", exported, "--index", tiny_set.index, code=code)[1]


def test_mistakes_are_said(copy: Path, tmp_path: Path) -> None:
    _, err = evaluate("--checkpoints", copy / "a", copy / "a", code=2)
    assert "is given twice, also as a/step-" in err and not (copy / "a/evaluations").exists()
    _, err = evaluate("--checkpoint", tmp_path, code=2)
    assert f"RUN (={tmp_path}) is not recognised; give a run folder, a checkpoint, a network that train.e" in err
    folder = Path(evaluate_json("--run", copy / "a", "--batch", 4)["evaluation"])
    data = bytearray((folder / predictions.PROBABILITIES).read_bytes())
    data[-1] ^= 1
    (folder / predictions.PROBABILITIES).write_bytes(data)
    assert "probabilities.npy) has SHA-256 " in evaluate("--checkpoints", folder, code=4)[1]
    again = evaluate_json("--run", copy / "a", "--batch", 4)
    assert again["tested"] == 24 and again["evaluation"] == f"{folder}-2"
    for words in ("--submission", tmp_path / "x"), ("--devkit", tmp_path / "x"):
        _, err = evaluate("--run", copy / "a", *words, code=2)
        assert "go together: the devkit has the classes' IDs; give both or neither" in err
