"""Ensembles: averages against a plain loop, ties, order; what may be averaged; the command cut off and resumed, live and saved.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ALONE, PAIR, finish, here, inside, launch
from train.checkpoint import checkpoint
from train.evaluate import predictions as saved
from train.export import __main__ as export, safetensors_io as weights
from train.evaluate.ensemble import alone, check_alike, five_best, together
from train.evaluate.__main__ import main as evaluate_main
from train.evaluate.probabilities import Evaluation, Facts, packed

FACTS = Facts("a" * 64, "i" * 64, "c" * 64, 3000, 12, 1, "fp32")


def evaluation(probabilities: np.ndarray, labels: np.ndarray, letter: str = "a") -> Evaluation:
    images, halves = packed(np.arange(len(labels)), torch.from_numpy(labels), torch.from_numpy(probabilities))
    facts = replace(FACTS, checkpoint=letter * 64, images=len(labels), outputs=probabilities.shape[1])
    return Evaluation(f"runs/{letter}/checkpoints/last", "val", "indexes/x", facts, images, halves, None, len(labels))


def drawn(count: int = 3000, classes: int = 12, members: int = 3) -> tuple[list[Evaluation], np.ndarray, list[np.ndarray]]:
    """Members with some skill and many equal probabilities."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, count)
    tables = []
    for _ in range(members):
        scores = random.integers(0, 4, (count, classes)).astype(np.float64)
        scores[np.arange(count), labels] += random.integers(0, 3, count)
        tables.append(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    return [evaluation(table, labels, letter) for table, letter in zip(tables, "abcdefg")], labels, tables


def test_an_ensemble_against_a_plain_loop() -> None:
    members, labels, tables = drawn()
    found = together(members)
    best = five_best(members, 12)
    for row in range(len(labels)):
        total = [sum(int(float(member.probabilities[row, k]) * 2 ** 24) for member in members) for k in range(12)]  # exact
        order = sorted(range(12), key=lambda k: (-total[k], k))
        assert found.places[row] == order.index(labels[row]) and best[row].tolist() == order[:5], row
        assert found.own[row] == pytest.approx(np.mean([table[row, labels[row]] for table in tables]), rel=1e-15)
    score = found.score
    assert 0 < score.top5_errors < score.top1_errors < min(alone(member).score.top1_errors for member in members)
    assert score.loss == pytest.approx(-np.log(np.mean([t[np.arange(3000), labels] for t in tables], 0)).mean(), rel=1e-12)


def test_order_changes_no_bit_and_one_is_itself() -> None:
    members, _, _ = drawn(members=5)
    one, other = together(members), together(members[::-1])
    assert np.array_equal(one.places, other.places) and np.array_equal(one.own, other.own)
    assert together(members[:1]).score == alone(members[0]).score


def test_float16_merges_neighbours_and_the_counts_of_one_network_are_still_exact() -> None:
    labels = np.array([1, 1])
    table = np.array([[0.5 - 1e-5, 0.5 + 1e-5, 0.0], [0.5, 0.5, 0.0]])
    member = evaluation(table, labels)
    assert alone(member).places.tolist() == [0, 1] and together([member]).places.tolist() == [1, 1]


def test_a_label_that_float16_has_lost_still_has_its_loss() -> None:
    member = evaluation(np.array([[1 - 1e-20, 1e-20]]), np.array([1]))
    assert member.probabilities[0, 1] == 0 and together([member, member]).score.loss == pytest.approx(46.05, abs=0.01)


def test_figures_of_an_ensemble_are_paired() -> None:
    members, _, _ = drawn()
    whole, one = together(members), alone(members[0])
    for name, (difference, (low, high)) in whole.less(one).items():
        assert low < difference < high < 0, name
    assert whole.less(one)["top1"][0] == pytest.approx(whole.score.top1 - one.score.top1)
    assert whole.less(whole)["loss"] == (0.0, (0.0, 0.0))
    low, high = whole.intervals()["top5"]
    assert low < whole.score.top5 < high


def test_what_cannot_be_averaged_is_named() -> None:
    a, b = drawn()[0][:2]
    check_alike([a, b])
    for change, message in [({"test_images": "j" * 64}, r"test images \(=jjjj.*\) of b/last must be those of a/last \(=iiii"),
                            ({"classes": "d" * 64}, r"classes \(=dddd.*\) of b/last must be those of a/last .*mean diff"),
                            ({"outputs": 13}, r"outputs \(=13\) of b/last must be those of a/last \(=12\) to be averaged"),
                            ({"checkpoint": "a" * 64}, r"member \(=b/last\) is given twice, also as a/last; give each network")]:
        with pytest.raises(ValueError, match=message):
            check_alike([a, replace(b, facts=replace(b.facts, **change))])
    check_alike([a, replace(a, facts=replace(a.facts, views=10))])


@pytest.fixture(scope="module")
def runs(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of an epoch, with other seeds, a and b."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = write_recipe(folder, tiny_set.index)
    for seed, name in enumerate("ab"):
        here(recipe, folder, "--train.epochs=1", "--train.test_views=1", f"--machine.name={name}", f"--train.seed={seed}")
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The runs, to be written into."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def evaluate(*argv: object, code: int = 0) -> tuple[str, str]:
    return inside(evaluate_main, [str(word) for word in argv], code)


def told(*argv: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(evaluate(*argv, "--json")[0])
    return found


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("evaluation", "tested", "checkpoint")}


def test_saved_equals_live(copy: Path) -> None:
    both = ("--checkpoints", copy / "a", copy / "b")
    live = told(*both, "--no-save")
    assert not (copy / "a/evaluations").exists() and live["members"][0]["evaluation"] is None
    first = told(*both)
    assert [entry["tested"] for entry in first["members"]] == [24, 24]
    folders = [Path(entry["evaluation"]) for entry in first["members"]]
    assert folders[0].parent == copy / "a/evaluations" and folders[0].name.endswith("-epoch-0001-val-1view")
    again = told(*both)
    assert [entry["tested"] for entry in again["members"]] == [0, 0]
    for name in "ab":  # neither checkpoints, nor recipes
        shutil.rmtree(copy / name / "checkpoints")
    from_files = told("--checkpoints", *folders)
    for other in first, again, from_files:
        assert other["ensemble"] == live["ensemble"]
        assert [figures(entry) for entry in other["members"]] == [figures(entry) for entry in live["members"]]
    turned = told("--checkpoints", *folders[::-1])["ensemble"]
    assert turned == {**live["ensemble"], "best_member": 1 - live["ensemble"]["best_member"]}
    tested = [json.loads(line) for line in (copy / "a/metrics.jsonl").read_text().splitlines()][-1]
    assert tested["kind"] == "test"
    assert all(live["members"][0][key] == tested[key] for key in ("top1_errors", "top5_errors", "loss"))


def test_a_person_reads_what_came_of_it(copy: Path) -> None:
    out, err = evaluate("--run", copy / "a", copy / "b")
    found = told("--run", copy / "a", copy / "b")
    assert out.startswith("split val: 24 images, 1 view each\na/step-")
    for entry in (*found["members"], found["ensemble"]):
        low, high = entry["intervals"]["top1"]
        assert f"top-1 errors {entry['top1_errors']} of 24 = {entry['top1']:.2%} (95% interval {low:.2%} to {high:.2%})" in out
        assert f"loss {entry['loss']:.4f} (" in out
    assert "\nensemble of 2, probabilities averaged\n" in out and "\nagainst its best member, " in out and " points (" in out
    assert f"\nsaved in {copy}/a/evaluations/step-" in out
    chance = [entry for entry in (*found["members"], found["ensemble"]) if entry["top1_errors"] >= 15]  # 9 right may be luck
    assert err.count("top-1 error is at chance") == len(chance) > 0
    assert f"\nno image was read: as saved in {copy}/a/evaluations" in evaluate("--run", copy / "a", copy / "b")[0]


@pytest.mark.parametrize("launcher, ending", [(ALONE, signal.SIGKILL), (ALONE, signal.SIGINT), (PAIR, signal.SIGTERM)])
def test_cut_off_and_resumed_gives_the_same(runs: Path, copy: Path, launcher: list[str], ending: signal.Signals) -> None:
    expected = told("--run", runs / "a", "--views", 10, "--batch", 1, "--no-save")
    command = [*launcher, *(["--"] if launcher is PAIR else []), "train.evaluate", "--run", str(copy / "a"), "--views", "10",
               "--batch", "1", "--json"]
    for _ in range(5):  # until it was quicker than the test
        code, rows, err = cut(command, copy / "a/evaluations", ending)
        if code:
            break
        shutil.rmtree(copy / "a/evaluations")
    assert code and 0 < rows < 24, err
    if ending == signal.SIGINT:
        assert code == 130 and err.endswith("interrupted; what was tested is saved, the same command goes on\n")
    found, err = evaluate("--run", copy / "a", "--views", 10, "--batch", 1, "--json")
    assert "images were tested before\n" in err and 0 < json.loads(found)["tested"] < 24
    assert figures(json.loads(found)["members"][0]) == figures(expected["members"][0]), "to the bit"


def cut(command: list[str], folder: Path, ending: signal.Signals) -> tuple[int, int, str]:
    """Start a test and end it when the first rows are there: its exit code, how many rows there were, what it said."""
    process = launch(command)
    try:
        until = time.monotonic() + 60
        while not (rows := sum(map(done_rows, folder.glob("*")))):
            assert time.monotonic() < until and process.poll() is None
        process.send_signal(ending)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, rows, err


def done_rows(folder: Path) -> int:
    try:
        return int((np.load(folder / saved.IMAGES)["crc32"] != 0).sum())
    except (OSError, ValueError, EOFError):  # it is being begun
        return 0


def test_two_processes_give_the_same(runs: Path, copy: Path) -> None:
    command = [*PAIR, "--", "train.evaluate", "--json", "--checkpoints"]
    both = json.loads(finish(launch([*command, str(copy / "a"), str(copy / "b")]))[0])
    expected = told("--checkpoints", runs / "a", runs / "b", "--no-save")
    assert both["ensemble"] == expected["ensemble"] and [entry["tested"] for entry in both["members"]] == [24, 24]
    from_files = finish(launch([*command, *(entry["evaluation"] for entry in both["members"])]))[0]
    assert json.loads(from_files)["ensemble"] == expected["ensemble"]


def test_where_it_is_saved(copy: Path, tmp_path: Path) -> None:
    found = told("--run", copy / "a", "--save", tmp_path / "kept")
    step = checkpoint.checkpoints(copy / "a/checkpoints")[-1].name
    assert found["evaluation"] == str(tmp_path / f"kept/a-{step}-val-1view") and not (copy / "a/evaluations").exists()
    (tmp_path / "file").write_text("")
    _, err = evaluate("--run", copy / "a", "--save", tmp_path / "file", code=4)
    assert f"evaluation (={tmp_path}/file/a-{step}-val-1view) could not be written (" in err and "or say --no-save" in err
    (copy / "a/evaluations").write_text("")  # as a folder that may not be written
    out, err = evaluate("--run", copy / "a")
    assert "could not be written (" in err and "the test goes on, its probabilities are not saved" in err
    assert "top-1 errors" in out and "saved in" not in out


def test_it_has_names_and_its_place_wherever_one_stands(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = checkpoint.checkpoints(copy / "a/checkpoints")[-1].name
    monkeypatch.chdir(copy / "a/checkpoints")
    assert told("--checkpoint", step)["evaluation"] == str(copy / f"a/evaluations/{step}-val-1view")
    monkeypatch.chdir(copy / "a")
    assert told("--run", ".", "--save", tmp_path / "kept")["evaluation"] == str(tmp_path / f"kept/a-{step}-val-1view")
    assert sorted(path.name for path in (copy / "a/checkpoints").iterdir()) == [step]


@pytest.fixture
def exported(copy: Path, tmp_path: Path) -> Path:
    """Run a's network as train.export writes it."""
    inside(export.main, [str(copy / "a"), "--out", str(tmp_path / "weights/a"), "--which", "last", "--no-check"], 0)
    return tmp_path / "weights/a"


def test_an_exported_folder_is_tested_as_its_checkpoint(copy: Path, exported: Path, tiny_set: TinySet) -> None:
    index = ("--index", tiny_set.index)
    found = told("--checkpoint", exported, *index)
    assert figures(found) == {**figures(told("--run", copy / "a")), "members": found["members"]}
    assert found["evaluation"] == str(exported.parent / "evaluations/a-val-1view") and found["tested"] == 24
    assert told("--checkpoint", exported, *index)["tested"] == 0
    both = told("--checkpoints", exported, copy / "b", *index)
    assert both["ensemble"] == told("--checkpoints", copy / "a", copy / "b")["ensemble"]
    _, err = evaluate("--checkpoints", exported, copy / "a", *index)
    assert "members weights/a and a/step-" in err and "gave the same probabilities to the bit; if they are one network" in err
    assert "same prob" not in evaluate("--checkpoints", exported, copy / "b", *index)[1]
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
    from train.recipe import load

    _, tensors = weights.load_safetensors(exported)
    (exported / weights.WEIGHTS).write_bytes(weights.pack(load(exported / weights.CONFIG), tensors, said))
    weights.write_manifest(exported)
    assert message in evaluate("--checkpoint", exported, "--index", tiny_set.index, code=code)[1]


def test_mistakes_are_said(copy: Path, tmp_path: Path) -> None:
    _, err = evaluate("--checkpoints", copy / "a", copy / "a", code=2)
    assert "is given twice, also as a/step-" in err and not (copy / "a/evaluations").exists()
    _, err = evaluate("--checkpoint", tmp_path, code=2)
    assert f"folder (={tmp_path}) is no run, checkpoint, exported network or saved evaluation; give one" in err
    folder = Path(told("--run", copy / "a", "--batch", 4)["evaluation"])
    data = bytearray((folder / saved.PROBABILITIES).read_bytes())
    data[-1] ^= 1
    (folder / saved.PROBABILITIES).write_bytes(data)
    assert "is not the one that was written" in evaluate("--checkpoints", folder, code=4)[1]
    out, err = evaluate("--run", copy / "a", "--batch", 4)
    assert "what is damaged is tested again\n" in err and "images were tested before" in err and "saved in" in out
    text = json.loads((folder / saved.MANIFEST).read_text())
    (folder / saved.MANIFEST).write_text(json.dumps({**text, "files": None}))
    assert "is not finished; give the command that began it again" in evaluate("--checkpoints", folder, code=2)[1]
    for words in ("--submission", tmp_path / "x"), ("--devkit", tmp_path / "x"):
        _, err = evaluate("--run", copy / "a", *words, code=2)
        assert "go together: the devkit has the classes' IDs; give both or neither" in err
