"""Studies: read whole before anything begins, run in order, gone on with, summed up. The runs are real ones, of seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import pytest

from pipeline.files import lock
from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import inside
from tools import run_study
from tools.study import Run, Study, lines, read_study, test_of as tested
from train.checkpoint import checkpoint
from train.evaluate.__main__ import main as evaluate_main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe, and beside it a folder for studies."""
    write_recipe(tmp_path)
    (tmp_path / "studies").mkdir()
    return tmp_path


def write(folder: Path, text: str, name: str = "s.yaml") -> Path:
    path = folder / "studies" / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *extra: str) -> Study:
    return read_study(write(folder, text), folder / "runs", extra)


def command(*words: object) -> tuple[int, str, str]:
    """The tool, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_study.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


# --- reading

def test_a_run_for_each_seed_and_point_of_the_grid(folder: Path) -> None:
    study = read(folder, """\
runs:
  - {name: full, recipe: small.yaml, seeds: [1, 2]}
  - name: tried
    recipe: small.yaml
    grid: {optimizer.lr: [1e-2, 1e-5], model.layers.conv3.std: [0.1], data.mean: [image, channel], model.lrn: [null]}
  - {name: tuned, recipe: small.yaml, seeds: [7], after: [full, tried], set: {init_from.checkpoint: "{study}/full-s{seed}"}}
set: {train.epochs: 4, init_from.renew: [fc8], init_from.checkpoint: "{x}"}
ensembles: [{name: two, of: [full]}, {name: all, of: [full, tried], views: 1}]
argv: [--machine.threads=2]
""", "--machine.threads=1", "--machine.log_s=3")
    at = folder / "runs" / "s"
    assert [run.name for run in study.runs] == [
        "full-s1", "full-s2", "tried-s1-lr0.01-std0.1-meanimage-lrnnull", "tried-s1-lr0.01-std0.1-meanchannel-lrnnull",
        "tried-s1-lr1e-05-std0.1-meanimage-lrnnull", "tried-s1-lr1e-05-std0.1-meanchannel-lrnnull", "tuned-s7"]
    full, last, tuned = study.runs[0], study.runs[5], study.runs[6]
    assert full.argv == (str(folder / "small.yaml"), "--train.epochs=4", "--init_from.renew=[\"fc8\"]",
                         "--init_from.checkpoint={x}", "--train.seed=1", "--machine.threads=2", "--machine.threads=1",
                         "--machine.log_s=3", f"--machine.runs={at}", "--machine.name=full-s1")
    assert (full.group, full.point, full.after) == ("full", "", ()) and tuned.after == ("full", "tried")
    assert last.point == "lr1e-05-std0.1-meanchannel-lrnnull" and last.config.machine.threads == 1
    assert (last.config.optimizer.lr, last.config.model.lrn, last.config.data.mean) == (1e-5, None, "channel")
    assert last.config.model.layers["conv3"].std == 0.1
    assert tuned.config.init_from.checkpoint == f"{at}/full-s7"
    assert (tuned.config.train.seed, tuned.config.train.epochs) == (7, 4)
    assert [(ensemble.name, ensemble.views) for ensemble in study.ensembles] == [("two", 10), ("all", 1)]
    assert [run.name for run in study.ensembles[0].members] == ["full-s1", "full-s2"]


def test_the_recipe_lies_beside_the_studys_folder_wherever_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "runs: [{name: a, recipe: small.yaml}]")
    for place, path in ((folder, "studies/s.yaml"), (folder / "studies", "s.yaml")):
        monkeypatch.chdir(place)
        assert read_study(Path(path), Path("runs")).runs[0].argv[0] == str(folder / "small.yaml")


def test_a_plan_is_printed_and_nothing_is_made(folder: Path) -> None:
    study = write(folder, "runs: [{name: a, recipe: small.yaml, set: {model.lrn: {n: 3}}}]")
    code, out, err = command(study, "--runs", folder / "runs", "--dry-run", "--", "--machine.log_s=3")
    assert (code, err) == (0, "") and not (folder / "runs").exists()
    assert out == (f"alexnet train {folder}/small.yaml '--model.lrn={{\"n\": 3}}' --train.seed=1 "
                   f"--machine.log_s=3 --machine.runs={folder}/runs/s --machine.name=a-s1\n")


@pytest.mark.parametrize(("text", "message"), [
    ("", "study (={path}) has no runs; see alexnet study --help"),
    ("runs: []", "study (={path}) has no runs; "),
    ("- a", "study (={path}) has no runs; "),
    ("runs: [", "study (={path}) is no YAML: while parsing"),
    ("runs: [{name: a, name: b}]", "study (={path}) is no YAML: key 'name' (line 1) is given twice; keep one; correct it"),
    ("run: [RUN]\nruns: [RUN]", "key (=run) of s.yaml is not known; it has argv, ensembles, runs, set"),
    ("runs: {name: a}", "runs (={{'name': 'a'}}) of s.yaml must be a list; put [ ] round it"),
    ("runs: [a]", "entry (=a) of runs of s.yaml must be a mapping; write {{name, recipe, …}}"),
    ("runs: [{recipe: small.yaml}]", "entry (={{'recipe': 'small.yaml'}}) of runs of s.yaml has no name; add it"),
    ("runs: [{name: a}]", "entry (={{'name': 'a'}}) of runs of s.yaml has no recipe; add it"),
    ("runs: [{name: a, recipe: small.yaml, seed: 1}]", "key (=seed) of run a is not known; it has after, grid, name"),
    ("runs: [{name: a/b, recipe: small.yaml}]", "name (=a/b) of runs of s.yaml must be letters, digits and _ . + -, for a f"),
    ("runs: [{name: a, recipe: no.yaml}]", "recipe (={folder}/no.yaml) does not exist; give a YAML file, or one of alexnet_"),
    ("runs: [{name: a, recipe: small.yaml, seeds: 1}]", "seeds (=1) of run a must be a list; put [ ] round it"),
    ("runs: [{name: a, recipe: small.yaml, seeds: [x]}]", "seeds (=['x']) of run a must be whole numbers; correct them"),
    ("runs: [{name: a, recipe: small.yaml, seeds: [1, 1]}]", "run (=a-s1) of s.yaml is there twice; give one another name"),
    ("runs: [RUN, RUN]", "run (=a-s1) of s.yaml is there twice; "),
    ("runs: [{name: a, recipe: small.yaml, grid: [1]}]", "grid (=[1]) of run a must map keys of the recipe to values; "),
    ("runs: [{name: a, recipe: small.yaml, grid: {optimizer.lr: 1}}]", "grid.optimizer.lr (=1) of run a must be a list of v"),
    ("runs: [{name: a, recipe: small.yaml, grid: {optimizer.lr: []}}]", "grid.optimizer.lr (=[]) of run a must be a list "),
    ("runs: [{name: a, recipe: small.yaml, grid: {train.seed: [1]}}]", "grid (=train.seed) of run a is said by the study i"),
    ("runs: [RUN]\nset: {machine.name: x}", "set (=machine.name) of s.yaml is said by the study itself; use seeds and name"),
    ("runs: [RUN]\nset: 3", "set (=3) of s.yaml must map keys of the recipe to values; write {{optimizer.lr: 0.01}}"),
    ("runs: [RUN]\nset: {optimizer.lrr: 3}", "run (=a-s1) of s.yaml cannot begin: --optimizer.lrr (=3) is no option; "),
    ("runs: [{name: a, recipe: small.yaml, grid: {optimizer.lr: [1, -1]}}]",
     "run (=a-s1-lr-1) of s.yaml cannot begin: optimizer.lr (=-1.0) must be positive; "),
    ("runs: [RUN]\nargv: --x", "argv (=--x) of s.yaml must be a list; "),
    ("runs: [RUN]\nargv: [1]", "argv (=[1]) of s.yaml must be a list of words; put them in quotes"),
    ("runs: [{name: a, recipe: small.yaml, after: b}]", "after (=b) of run a must be a list; "),
    ("runs: [{name: a, recipe: small.yaml, after: [b]}]", "run (=b) is not among those of s.yaml: a; correct the name"),
    ("runs: [{name: a, recipe: small.yaml, after: [a]}]", "after (=a → a) goes round in a circle; take one of them away"),
    ("runs: [RUN, {name: b, recipe: small.yaml, after: [c]}, {name: c, recipe: small.yaml, after: [b]}]", "round in a circle"),
    ("runs: [RUN]\nensembles: [{name: e}]", "entry (={{'name': 'e'}}) of ensembles of s.yaml has no of; add it"),
    ("runs: [RUN]\nensembles: [{of: [a]}]", "entry (={{'of': ['a']}}) of ensembles of s.yaml has no name; add it"),
    ("runs: [RUN]\nensembles: [{name: e, of: a}]", "of (=a) of ensemble e must be a list; "),
    ("runs: [RUN]\nensembles: [{name: e, of: [b]}]", "run (=b) is not among those of s.yaml: a; correct the name"),
    ("runs: [RUN]\nensembles: [{name: e, of: [a]}]", "ensemble (=e) has one network only; name more runs, or give "),
    ("runs: [RUN]\nensembles: [{name: e, of: [a], views: 5}]", "views (=5) of ensemble e must be 1 or 10; correct it"),
    ("runs: [{name: a, recipe: small.yaml, seeds: [1, 2]}]\nensembles: [{name: e, of: [a]}, {name: e, of: [a]}]",
     "ensemble (=e) of s.yaml is there twice; give one another name"),
])
def test_mistakes_in_a_study(folder: Path, text: str, message: str) -> None:
    path = write(folder, text.replace("RUN", "{name: a, recipe: small.yaml}"))
    code, out, err = command(path, "--runs", folder / "runs")
    assert code == 2 and err.startswith(f"error: {message.format(path=path, folder=folder)}" if "circle" not in message
                                        else "error: after (=") and message.format(path=path, folder=folder) in err
    assert out == "" and err.count("\n") == 1 and not (folder / "runs").exists()


def test_mistakes_on_the_command_line(folder: Path) -> None:
    path = write(folder, "runs: [{name: a, recipe: small.yaml}]")
    assert command(folder / "none.yaml") == (
        2, "", f"error: study (={folder}/none.yaml) does not exist; give a YAML file, or one of figure1, ilsvrc2012_ablations, "
        "ilsvrc2012_ensembles, tiny100_ablations, [...]\n")
    assert command(path, "--jobs", 0) == (2, "", "error: --jobs (=0) must be at least 1; correct it\n")
    code, _, err = command(path, "--runs", folder / "runs", "--", "--what")
    assert code == 2 and "run (=a-s1) of s.yaml cannot begin: --what (=none) is no option; " in err
    (folder / "studies" / "latin.yaml").write_bytes("# für\n".encode("latin-1"))
    assert "is no YAML: 'utf-8' codec can't decode" in command(folder / "studies" / "latin.yaml")[2]
    (folder / "file").touch()
    code, _, err = command(path, "--runs", folder / "file")
    assert code == 2 and "lies below a file, which is no folder" in err and "Traceback" not in err


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "train/recipes/studies").glob("*.yaml")))
def test_the_studies_that_are_there_can_begin(name: str) -> None:
    study = read_study(ROOT / "train/recipes/studies" / f"{name}.yaml", Path("runs"))
    assert study.name == name and len({run.name for run in study.runs}) == len(study.runs) > 1


# --- summing up

def finish(folder: Path, run: Run, top1: float, top5: float, cut: str = "") -> None:
    """As if the run were done, with these errors; `cut`: what stands behind the last whole line."""
    at = folder / "runs" / "s" / run.name
    at.mkdir(parents=True)
    told = [{"kind": "step", "time": 0.0, "step": 0}, {"kind": "test", "time": 0.0, "top1": top1, "top5": top5}]
    (at / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + cut, encoding="utf-8")


def test_seeds_are_summed_up_and_points_are_not(folder: Path) -> None:
    study = read(folder, "runs:\n  - {name: full, recipe: small.yaml, seeds: [1, 2, 3]}\n"
                 "  - {name: tried, recipe: small.yaml, seeds: [1, 2], grid: {model.layers.conv1.std: [0.1, 0.2]}}\n")
    for run, top1 in zip(study.runs, (0.5, 0.25, 0.75, 0.1, 0.2, 0.4)):  # tried-s2-std0.2 is not done
        finish(folder, run, top1, top1 / 2)
    rows = run_study.summary(study, folder / "runs" / "s")
    assert [(row["name"], row["seeds"]) for row in rows] == [("full", 3), ("tried std0.1", 2), ("tried std0.2", 1)]
    assert rows[0]["top1_mean"] == 0.5 and rows[0]["top1_sd"] == 0.25 == 2 * rows[0]["top5_sd"]
    assert rows[1]["top1_mean"] == pytest.approx(0.25) and rows[1]["top5_sd"] == pytest.approx(statistics.stdev([0.05, 0.2]))
    assert rows[2] == {"name": "tried std0.2", "seeds": 1, "top1_mean": 0.2, "top1_sd": None, "top5_mean": 0.1, "top5_sd": None}


def test_a_line_that_is_half_there_is_no_test(folder: Path) -> None:
    run = read(folder, "runs: [{name: a, recipe: small.yaml}]").runs[0]
    at = folder / "runs" / "s" / run.name
    finish(folder, run, 0.5, 0.25, cut='{"kind": "test", "time": 1.0, "to')
    assert tested(at) == {"kind": "test", "time": 0.0, "top1": 0.5, "top5": 0.25} and tested(folder) is None
    (at / "metrics.jsonl").write_text('{"kind": "test", "time": 1.0, "top1": 0.5}', encoding="utf-8")
    assert tested(at) is None


# --- stopping

def test_what_asks_to_stop_is_heard_and_what_is_ignored_is_not() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with run_study.listening() as heard:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second one kills"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in before} == before


# --- real runs

@dataclass(frozen=True)
class Carried:
    """A study that was carried out: its file, the folder of run folders, exit code and output of the first time."""

    file: Path
    folder: Path
    code: int
    out: str
    err: str


STUDY = """\
runs:
  - {name: base, recipe: small.yaml, seeds: [1, 2]}
  - {name: tuned, recipe: small.yaml, seeds: [2], after: [base], set: {init_from.checkpoint: "{study}/base-s{seed}"}}
  - {name: broken, recipe: small.yaml, set: {data.test_split: none}}
  - {name: never, recipe: small.yaml, after: [broken]}
  - {name: nor, recipe: small.yaml, after: [never]}
  - {name: rate, recipe: small.yaml, grid: {optimizer.lr: [1e30]}}
set: {train.epochs: 1, train.test_views: 1, machine.checkpoint_steps: 0}
ensembles:
  - {name: two, of: [base], views: 1}
  - {name: lost, of: [base, never], views: 1}
  - {name: wild, of: [base, rate], views: 1}
"""


@pytest.fixture(scope="module")
def carried(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Carried:
    """Two at once; from another folder than the repository's."""
    place = tmp_path_factory.mktemp("study")
    write_recipe(place, tiny_set.index)
    (place / "studies").mkdir()
    file = write(place, STUDY)
    done = subprocess.run([sys.executable, str(ROOT / "tools/run_study.py"), "studies/s.yaml", "--runs", "runs", "--jobs", "2"],
                          cwd=place, capture_output=True, text=True, timeout=300)
    return Carried(file, place / "runs" / "s", done.returncode, done.stdout, done.stderr)


def test_runs_come_in_their_order_and_as_many_as_there_are_jobs(carried: Carried) -> None:
    def line(name: str, event: str) -> int:
        return carried.out.index(f"\n{name}: {event}")

    assert carried.out.startswith("s: 7 runs, 0 of them done already\n")
    ends = [line(name, "top-1 error ") for name in ("base-s1", "base-s2")]
    assert max(line(name, "started\n") for name in ("base-s1", "base-s2")) < min(ends), "the two were at work at once"
    assert max(ends) < line("tuned-s2", "started\n") < line("tuned-s2", "top-1 error ")
    log = (carried.folder / "tuned-s2.log").read_text(encoding="utf-8")
    assert f"weights of conv1, conv2, conv3, conv4, conv5, fc6, fc7, fc8 from {carried.folder}/base-s2/checkpoints/step-" in log


def test_what_fails_is_told_with_its_reason_and_the_others_go_on(carried: Carried) -> None:
    assert carried.code == 1
    reason = f"exit code 2: {(carried.folder / 'broken-s1.log').read_text(encoding='utf-8').strip().removeprefix('error: ')}"
    assert "split (=none) is not in the index" in reason
    wanted = {"broken-s1": reason, "never-s1": "comes after broken, which failed", "nor-s1": "comes after never, which failed",
              "ensemble lost": "its never-s1 failed", "ensemble wild": "its rate-s1-lr1e+30 diverged"}
    assert json.loads((carried.folder / "study.json").read_text(encoding="utf-8"))["failed"] == wanted
    for name, why in wanted.items():
        assert f"{name}: failed: {why}\n" in carried.out and f"failed: {name}: {why}\n" in carried.err
    assert not (carried.folder / "broken-s1").exists() and not (carried.folder / "never-s1.log").exists()


def test_a_point_that_diverged_is_an_answer(carried: Carried) -> None:
    found = json.loads((carried.folder / "study.json").read_text(encoding="utf-8"))
    assert list(found["diverged"]) == ["rate-s1-lr1e+30"]
    assert "is not finite; the update was not made" in found["diverged"]["rate-s1-lr1e+30"]
    assert "\nrate-s1-lr1e+30: diverged\n" in carried.out and "\nrate-s1-lr1e+30 diverged\n" in carried.out


def test_the_summary_has_the_errors_of_the_runs(carried: Carried) -> None:
    found = json.loads((carried.folder / "study.json").read_text(encoding="utf-8"))
    first, second, tuned = (tested(carried.folder / name) for name in ("base-s1", "base-s2", "tuned-s2"))
    assert first and second and tuned
    base, alone = found["rows"]
    assert (base["name"], base["seeds"], alone["name"], alone["seeds"]) == ("base", 2, "tuned", 1)
    for which in ("top1", "top5"):
        assert base[f"{which}_mean"] == pytest.approx((first[which] + second[which]) / 2)
        assert base[f"{which}_sd"] == pytest.approx(abs(first[which] - second[which]) / 2 ** 0.5)
        assert alone[f"{which}_mean"] == tuned[which] and alone[f"{which}_sd"] is None
    table = carried.out[carried.out.index("\nrun  "):].splitlines()[2:5]
    assert [line.split()[:2] for line in table] == [["base", "2"], ["tuned", "1"], ["ensemble", "two"]]
    assert f"{base['top1_mean']:7.2%} ± {base['top1_sd']:.2%}" in table[0] and f"{tuned['top1']:7.2%}" in table[1]
    assert "top-5" not in carried.out, "of six classes"


def test_an_ensemble_is_what_evaluate_says_of_it(carried: Carried) -> None:
    found = json.loads((carried.folder / "study.json").read_text(encoding="utf-8"))["ensembles"]
    assert list(found) == ["two"] and found["two"]["split"] == "val"
    for member, name in zip(found["two"]["members"], ("base-s1", "base-s2"), strict=True):
        assert (result := tested(carried.folder / name)) and member["views"] == 1
        assert (member["top1_errors"], member["top5_errors"]) == (result["top1_errors"], result["top5_errors"])
        assert member["checkpoint"] == str(checkpoint.checkpoints(carried.folder / name / "checkpoints")[-1])
    words = ["--json", "--checkpoints", *(member["evaluation"] for member in found["two"]["members"])]
    again = json.loads(inside(evaluate_main, words, 0)[0])
    assert again["ensemble"] == found["two"]["ensemble"]
    row = next(line for line in carried.out.splitlines() if line.startswith("ensemble two  "))
    assert row.split() == ["ensemble", "two", "2", f"{again['ensemble']['top1']:.2%}"]


def test_the_same_command_repeats_only_what_failed(carried: Carried) -> None:
    before = {path: path.stat().st_mtime_ns for path in carried.folder.glob("*/*.*")}
    assert len(before) > 12
    code, out, err = command(carried.file, "--runs", carried.folder.parent, "--jobs", 2)
    assert code == 1 and out.startswith(
        "s: 7 runs, 4 of them done already\nbroken-s1: started\nbroken-s1: failed: exit code 2: split (=none) ")
    assert {path: path.stat().st_mtime_ns for path in carried.folder.glob("*/*.*")} == before
    found = json.loads((carried.folder / "study.json").read_text(encoding="utf-8"))
    assert [member["tested"] for member in found["ensembles"]["two"]["members"]] == [0, 0]
    assert list(found["failed"]) == ["broken-s1", "never-s1", "nor-s1", "ensemble lost", "ensemble wild"]


def test_another_recipe_is_not_taken_for_done(carried: Carried) -> None:
    """Whether a run is done or was only begun, nothing of the study begins. A run may be extended, if none came after it."""
    file = carried.file.parent / "other" / "s.yaml"
    file.parent.mkdir(exist_ok=True)
    (file.parent.parent / "small.yaml").write_bytes((carried.file.parent.parent / "small.yaml").read_bytes())
    longer = STUDY.replace("train.epochs: 1", "train.epochs: 2")
    for name, text, why in (
            ("rate-s1-lr1e+30", STUDY.replace("grid:", "set: {data.mirror: false}, grid:"),
             "is of another recipe than the study's (data.mirror: True -> False)"),
            ("tuned-s2", longer, "began after base, which the study now trains further")):
        file.write_text(text, encoding="utf-8")
        code, out, err = command(file, "--runs", carried.folder.parent)
        assert (code, out) == (2, "") and err == (
            f"error: run folder (={carried.folder / name}) {why}; move it away, or give another --out\n")
    file.write_text("".join(line for line in longer.splitlines(True) if "tuned" not in line), encoding="utf-8")
    waiting = run_study.Runs(read_study(file, carried.folder.parent), carried.folder).waiting
    assert [run.name for run in waiting if run.group == "base"] == ["base-s1", "base-s2"]


@contextlib.contextmanager
def launched(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The tool in a process of its own, which is gone in the end, with all that it has begun."""
    tool = subprocess.Popen([sys.executable, str(ROOT / "tools/run_study.py"), *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield tool
    finally:
        if tool.poll() is None:
            left = children(tool.pid)
            tool.kill()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        with tool:  # closes its pipes
            pass


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def alive(pid: int) -> bool:
    """Running; neither gone nor waiting to be buried."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def step(run: Path) -> int:
    found = checkpoint.checkpoints(run / "checkpoints")
    return int(found[-1].name.split("-")[1]) if found else 0


def until(what: Any, tool: subprocess.Popen[str]) -> None:
    """Wait until `what()`, while the tool runs."""
    end = time.monotonic() + 120
    while not what():
        assert tool.poll() is None, tool.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_saves_a_kill_loses_little_and_the_same_command_goes_on(tiny_set: TinySet, tmp_path: Path) -> None:
    write_recipe(tmp_path, tiny_set.index)
    (tmp_path / "studies").mkdir()
    study = write(tmp_path, "runs: [{name: a, recipe: small.yaml}]\nset: {train.epochs: 4, train.test_views: 1}\n"
                  "argv: [--machine.checkpoint_steps=1]\n")
    run = tmp_path / "runs" / "s" / "a-s1"
    words = (study, "--runs", tmp_path / "runs")
    with launched(*words) as tool:
        until(lambda: step(run) >= 2, tool)
        child, = children(tool.pid)
        tool.send_signal(signal.SIGINT)
        out, err = tool.communicate(timeout=60)
    assert (tool.returncode, err) == (130, "interrupted; the runs are saved, and the same command resumes them\n")
    assert not alive(child)
    saved = step(run)
    log = run.with_name("a-s1.log")
    assert f"stopped and saved at step {saved}; " in log.read_text(encoding="utf-8") and 2 <= saved < 38

    with launched(*words) as tool:  # killed itself: its run goes on alone, and nobody may begin it a second time meanwhile
        until(lambda: step(run) >= saved + 2, tool)
        child, = children(tool.pid)
        os.kill(child, signal.SIGSTOP)  # so that it is not done before we have looked
        tool.kill()
        tool.wait()
    try:
        code, out, err = command(*words)
    finally:
        os.kill(child, signal.SIGKILL)
    assert (code, out) == (2, "") and err.startswith(f"error: study folder (={run.parent}) is in use by pid ")
    lock(run.parent / ".lock", wait=True).close()  # the last thread of the killed run may let go of it late
    code, out, err = command(*words)
    assert code == 0, (out, err)
    assert f"resuming from {run}/checkpoints/step-" in log.read_text(encoding="utf-8")
    resumed = [json.loads(line)["resumed_at"] for line in (run / "versions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert resumed[:2] == [0, saved] and len(resumed) == 3 and resumed[2] >= saved + 2
    assert [line["step"] for line in lines(run, "step")] == list(range(38))
    assert json.loads((run.parent / "study.json").read_text(encoding="utf-8"))["failed"] == {}
