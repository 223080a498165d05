"""Run the experiments of a study, several at once if the machine allows, and show what came of them.

    python tools/run_study.py train/recipes/studies/NAME.yaml [--jobs 4] [--runs runs] [-- --machine.device=cuda …]

A study is YAML:

    runs:                              # each makes a run folder RUNS/NAME/RUN-s<seed>[-<value>…]
      - {name: full, recipe: tiny100.yaml, seeds: [1, 2, 3]}
      - {name: slow, recipe: tiny100.yaml, seeds: [1], grid: {optimizer.lr: [1e-2, 1e-3]}}
      - {name: tuned, recipe: new.yaml, seeds: [1], after: [full], set: {init_from.checkpoint: "{study}/full-s{seed}"}}
    set: {train.epochs: 20}            # for all runs; a run's own `set` comes after it
    ensembles:
      - {name: three, of: [full], views: 10}
    argv: [--machine.precision=bf16]   # what changes no result

Recipes are looked for beside the study's folder; a run without seeds has seed 1. All command lines are checked before the first
run begins. What is done already is left alone, what was begun goes on (--resume), what fails is reported at the end, and the
other runs go on; in a grid, a rate at which training diverges is an answer, noted in the run's folder (remove that to try it
again). Ctrl-C, or SIGTERM, stops all of them with a checkpoint; a second Ctrl-C does not wait for it. What a run prints is in
RUNS/NAME/RUN.log, a summary in RUNS/NAME/study.json. Exit codes: 0 all done, 1 some failed, 2 a mistake in the study, 130
interrupted.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tools.study import Run, Study

POLL_S = 0.2
DIVERGED = "diverged.txt"  # in the folder of a run of a grid whose loss was not finite: its last words


@dataclass
class State:
    """What has become of the runs. `running`: the run of a process, and where in its log what this process says begins."""

    waiting: list[Run] = field(default_factory=list)
    running: dict[subprocess.Popen[bytes], tuple[Run, int]] = field(default_factory=dict)
    done: list[Run] = field(default_factory=list)
    diverged: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def look(study: Study, folder: Path) -> State:
    """What is there already.

    Raises:
        ValueError: a folder holds a run of another recipe than the study's now.
    """
    from tools.study import test_of
    from train.config import differences
    from train.recipe import load

    state = State()
    for run in study.runs:
        settled, note = folder / run.name / "config.yaml", folder / run.name / DIVERGED
        if settled.exists() and (stored := load(settled)).fingerprint() != run.config.fingerprint():
            changed = "; ".join(differences(run.config.as_dict(), stored.as_dict()))
            raise ValueError(f"run folder (={settled.parent}) is of another recipe than the study's ({changed}); move it "
                             "away, or give another --runs")
        if test_of(folder / run.name):
            state.done.append(run)
        elif run.point and note.exists():
            state.diverged[run.name] = note.read_text(encoding="utf-8").strip()
        else:
            state.waiting.append(run)
    return state


def carry_out(study: Study, folder: Path, jobs: int, lock: int) -> State:
    """Run what is not done, `jobs` at once, in the order of the study. `lock`: file descriptor that the runs keep open.

    Raises:
        ValueError: as `look`. KeyboardInterrupt: asked to stop; the runs have ended.
    """
    state = look(study, folder)
    print(f"{study.name}: {len(study.runs)} runs, {len(study.runs) - len(state.waiting)} of them done already", flush=True)
    with _listening() as heard:
        try:
            while not heard and (state.waiting or state.running):
                _start(state, study, folder, jobs, lock)
                time.sleep(POLL_S)
                for process in [process for process in state.running if process.poll() is not None]:
                    _ended(state, process, folder)
        finally:
            for process in state.running:
                process.send_signal(signal.SIGTERM)  # in sessions of their own: the terminal's Ctrl-C does not reach them
            for process in state.running:
                process.wait()
    if heard:
        raise KeyboardInterrupt
    return state


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come: Ctrl-C, SIGTERM, a closed terminal. A second Ctrl-C ends us at once."""
    heard: list[int] = []

    def hear(number: int, frame: Optional[FrameType]) -> None:
        heard.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The study's folder is this process's, and its runs', until all of them have ended; else two would write one run.

    Raises:
        ValueError: it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"study folder (={folder}) is being worked on by another tools/run_study.py, or by runs that "
                             "a killed one has left; wait until they have ended, or end them") from None
        yield file.fileno()


def _start(state: State, study: Study, folder: Path, jobs: int, lock: int) -> None:
    """Begin what can begin; what comes after a failed run never can."""
    running = [run for run, _ in state.running.values()]
    unfinished = {run.group for run in (*state.waiting, *running)}
    for run in list(state.waiting):
        broken = [name for name in run.after if any(other.group == name and other.name in state.failed for other in study.runs)]
        if broken:
            state.waiting.remove(run)
            _fails(state, run.name, f"comes after {broken[0]}, which failed")
        elif len(state.running) < jobs and not unfinished.intersection(run.after):
            state.waiting.remove(run)
            resume = ["--resume"] if (folder / run.name / "config.yaml").exists() else []
            with (folder / f"{run.name}.log").open("ab") as log:
                began = log.tell()
                process = subprocess.Popen([sys.executable, "-m", "train.main", *run.argv, *resume], stdout=log, stderr=log,
                                           start_new_session=True, pass_fds=[lock], env=_environment())
            state.running[process] = run, began


def _environment() -> dict[str, str]:
    """Ours, with this tree's packages to be found from any folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _ended(state: State, process: subprocess.Popen[bytes], folder: Path) -> None:
    """A run's process has ended: it is done, has diverged, or failed."""
    from tools.study import test_of
    from train.exit_codes import NOT_FINITE

    run, began = state.running.pop(process)
    found = test_of(folder / run.name)
    if process.returncode == 0 and found:
        state.done.append(run)
        print(f"{run.name}: top-1 error {found['top1']:.2%}, top-5 {found['top5']:.2%}", flush=True)
        return
    said = (folder / f"{run.name}.log").read_bytes()[began:].decode(errors="replace").strip().splitlines() or ["no output"]
    last = next((line for line in reversed(said) if line.startswith("error: ")), said[-1]).removeprefix("error: ")
    if run.point and process.returncode == NOT_FINITE:
        state.diverged[run.name] = last
        (folder / run.name / DIVERGED).write_text(f"{last}\n", encoding="utf-8")
        print(f"{run.name}: diverged", flush=True)
        return
    _fails(state, run.name, f"exit code {process.returncode}: {last}")


def _fails(state: State, name: str, reason: str) -> None:
    state.failed[name] = reason
    print(f"{name}: failed: {reason}", flush=True)


def ensembles(study: Study, folder: Path, extra: Sequence[str], state: State) -> dict[str, Any]:
    """Test every ensemble of the study; what train.evaluate --json says of each. One that cannot be tested is noted as failed."""
    found: dict[str, Any] = {}
    for ensemble in study.ensembles:
        members, title = [run.name for run in study.members(ensemble)], f"ensemble {ensemble.name}"
        if missing := [name for name in members if name in state.failed or name in state.diverged]:
            _fails(state, title, f"its {missing[0]} {'failed' if missing[0] in state.failed else 'diverged'}")
            continue
        print(f"{title}: testing {len(members)} networks", flush=True)
        words = [sys.executable, "-m", "train.evaluate", "--json", "--views", str(ensemble.views), *extra, "--checkpoints",
                 *(str(folder / name) for name in members)]
        answer = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=_environment())
        if answer.returncode:
            _fails(state, title, f"train.evaluate ended with exit code {answer.returncode}, see above")
            continue
        found[ensemble.name] = json.loads(answer.stdout)
    return found


def summary(study: Study, folder: Path) -> list[dict[str, Any]]:
    """A row for each group and point of the grid: seeds, mean and standard deviation (None for one) of the errors (shares)."""
    from tools.study import test_of

    rows: dict[str, list[dict[str, Any]]] = {}
    for run in study.runs:
        if found := test_of(folder / run.name):
            rows.setdefault(f"{run.group} {run.point}".strip(), []).append(found)
    return [{"name": name, "seeds": len(tests),
             **{f"{which}_{what}": number for which in ("top1", "top5") for what, number in
                (("mean", statistics.fmean(test[which] for test in tests)),
                 ("sd", statistics.stdev([test[which] for test in tests]) if len(tests) > 1 else None))}}
            for name, tests in rows.items()]


def show(rows: list[dict[str, Any]], together: dict[str, Any], state: State) -> None:
    """The table on stdout; what failed on stderr."""
    both = ("top1", "top5")
    lines = [(row["name"], row["seeds"], *((row[f"{which}_mean"], row[f"{which}_sd"]) for which in both)) for row in rows]
    lines += [(f"ensemble {name}", len(found["members"]), *((found["ensemble"][which], None) for which in both))
              for name, found in together.items()]
    width = max((len(line[0]) for line in lines), default=3)
    print(f"{'run':{width}}  seeds  top-1 error       top-5 error")
    for name, seeds, *errors in lines:
        cells = [f"{mean:7.2%}" + (f" ± {sd:.2%}" if sd is not None else "") for mean, sd in errors]
        print(f"{name:{width}}  {seeds:5d}  {cells[0]:16}  {cells[1]}")
    for name in state.diverged:
        print(f"{name} diverged")
    for name, reason in state.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)


def run(asked: argparse.Namespace, extra: Sequence[str]) -> int:
    """Read the study, run it, test its ensembles, show what came of it. Returns the exit code; raises ValueError."""
    from tools.study import read_study

    if asked.jobs < 1:
        raise ValueError(f"--jobs (={asked.jobs}) must be at least 1; leave it out for one run at a time")
    study = read_study(asked.study, asked.runs.absolute(), extra)
    folder = asked.runs.absolute() / study.name
    if asked.dry_run:
        for planned in study.runs:
            print("python -m train.main " + shlex.join(planned.argv))
        return 0
    with _locked(folder) as lock:
        state = carry_out(study, folder, asked.jobs, lock)
        rows, together = summary(study, folder), ensembles(study, folder, shlex.split(asked.evaluate), state)
        text = {"rows": rows, "ensembles": together, "diverged": state.diverged, "failed": state.failed}
        (folder / "study.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    show(rows, together, state)
    return 1 if state.failed else 0


def main(argv: Optional[list[str]] = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, extra = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="run_study.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at once (default 1); on a CPU give each its --machine.torch_threads")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders (default runs)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("--evaluate", default="", metavar="WORDS", help="more words for train.evaluate of ensembles, in quotes")
    asked = parser.parse_args(words)
    try:
        return run(asked, extra)
    except KeyboardInterrupt:
        print("interrupted; the runs are saved, and the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
