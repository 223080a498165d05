"""Run the experiments of a study, several at once if the machine allows, and show what came of them.

    python tools/run_study.py tiny50 [--jobs 4] [--out runs] [-- --machine.device=cuda …]

A study is YAML:

    runs:                              # each makes a run folder OUT/NAME/RUN-s<seed>[-<value>…]
      - {name: full, recipe: tiny100.yaml, seeds: [1, 2, 3]}
      - {name: slow, recipe: tiny100.yaml, seeds: [1], grid: {optimizer.lr: [1e-2, 1e-3]}}
      - {name: tuned, recipe: new.yaml, seeds: [1], after: [full], set: {init_from.checkpoint: "{study}/full-s{seed}"}}
    set: {train.epochs: 20}            # for all runs; a run's own `set` comes after it
    ensembles:
      - {name: three, of: [full], views: 10}
    argv: [--machine.precision=bf16]   # what changes no result

Recipes are looked for beside the study's folder, then among those that come with this program; a run without seeds has seed 1.
All command lines are checked before the first run begins. What is done already is left alone, what was begun is resumed, what has
more epochs now is extended, what fails is reported at the end, and the other runs continue; in a grid, a rate at which training
diverges is an answer, noted in the run's folder (remove that to try it again). Ctrl-C, or SIGTERM, stops all of them with a
checkpoint; a second Ctrl-C does not wait for it. What a run prints is in OUT/NAME/RUN.log, a summary in OUT/NAME/study.json. Exit
codes: 0 all done, 1 some failed, 2 a mistake in the study, 4 the machine failed, 130 interrupted.
"""
import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from pipeline.files import LockHeld, lock, write_json  # noqa: E402 (the path first)
from tools.alexnet import command  # noqa: E402
from tools.cli import guarded  # noqa: E402
from tools.study import Run, Study, read_study, test_of  # noqa: E402
from train.cli import Parser, at_least  # noqa: E402
from train.config import differences  # noqa: E402
from train.evaluate.metrics import FEW_CLASSES  # noqa: E402
from train.exit_codes import NOT_FINITE  # noqa: E402
from train.recipe import load  # noqa: E402
from train.run_folder import EXTENDABLE  # noqa: E402

POLL_S = 0.2
DIVERGED = "diverged.txt"  # in the folder of a run of a grid whose loss was not finite: its last words
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}


class Runs:
    """The runs of a study, and what has become of them. Raises ValueError when a folder holds a run of another recipe."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        few = any(run.config.model.classes < FEW_CLASSES for run in study.runs)
        self.errors = {"top1": "top-1 error"} if few else {"top1": "top-1 error", "top5": "top-5 error"}
        self.waiting: list[Run] = []
        self.running: dict[subprocess.Popen[bytes], tuple[Run, int]] = {}  # and where in its log this process's output begins
        self.diverged: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        changed = {run.name: differences(run.config.as_dict(), load(path).as_dict()) for run in study.runs
                   if (path := folder / run.name / "config.yaml").exists()}
        extended = {run.group for run in study.runs if changed.get(run.name)}
        for run in study.runs:
            note, lines = folder / run.name / DIVERGED, changed.get(run.name, [])
            if any(line.partition(":")[0] not in EXTENDABLE for line in lines):
                raise ValueError(f"run folder (={folder / run.name}) is of another recipe than the study's ({'; '.join(lines)}); "
                                 "move it away, or give another --out")
            if run.name in changed and (before := extended.intersection(run.after)):
                raise ValueError(f"run folder (={folder / run.name}) began after {before.pop()}, which the study now trains "
                                 "further; move it away, or give another --out")
            if run.point and note.exists():
                self.diverged[run.name] = note.read_text(encoding="utf-8").strip()
            elif lines or not test_of(folder / run.name):
                self.waiting.append(run)

    def carry_out(self, jobs: int, lock_file: int) -> None:
        """Run what is not done, `jobs` at once, in the order of the study. `lock_file`: descriptor that the runs keep open.

        Raises KeyboardInterrupt after a signal to stop; the runs have ended.
        """
        print(f"{self.study.name}: {len(self.study.runs)} runs, {len(self.study.runs) - len(self.waiting)} of them done already",
              flush=True)
        with listening() as signals:
            try:
                while not signals and (self.waiting or self.running):
                    self._start(jobs, lock_file)
                    time.sleep(POLL_S)
                    for process in [process for process in self.running if process.poll() is not None]:
                        self._ended(process)
            finally:
                for process in self.running:
                    process.send_signal(signal.SIGTERM)  # in sessions of their own: the terminal's Ctrl-C does not reach them
                for process in self.running:
                    process.wait()
        if signals:
            raise KeyboardInterrupt

    def _start(self, jobs: int, lock_file: int) -> None:
        """Begin what can begin; what comes after a failed run never can."""
        unfinished = {run.group for run in (*self.waiting, *(run for run, _ in self.running.values()))}
        failed = {run.group for run in self.study.runs if run.name in self.failed}
        for run in list(self.waiting):
            if broken := [name for name in run.after if name in failed]:
                self.waiting.remove(run)
                self.fail(run.name, f"comes after {broken[0]}, which failed")
                failed.add(run.group)
            elif len(self.running) < jobs and not unfinished.intersection(run.after):
                self.waiting.remove(run)
                resume = ["--resume"] if (self.folder / run.name / "config.yaml").exists() else []
                with (self.folder / f"{run.name}.log").open("ab") as log:
                    began = log.tell()
                    process = subprocess.Popen(command("train", *run.argv, *resume), stdout=log, stderr=log,
                                               start_new_session=True, pass_fds=[lock_file], env=ENVIRONMENT)
                self.running[process] = run, began
                print(f"{run.name}: {'resumed' if resume else 'started'}", flush=True)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """A run's process has ended: it is done, has diverged, or failed."""
        run, began = self.running.pop(process)
        if process.returncode == 0 and (test := test_of(self.folder / run.name)):
            print(f"{run.name}: " + ", ".join(f"{title} {test[which]:.2%}" for which, title in self.errors.items()), flush=True)
            return
        output = (self.folder / f"{run.name}.log").read_bytes()[began:].decode(errors="replace").strip().splitlines()
        last = next((line for line in reversed(output) if line.startswith("error: ")), (output or ["no output"])[-1])
        last = last.removeprefix("error: ")
        if run.point and process.returncode == NOT_FINITE:
            self.diverged[run.name] = last
            (self.folder / run.name / DIVERGED).write_text(f"{last}\n", encoding="utf-8")
            print(f"{run.name}: diverged", flush=True)
            return
        self.fail(run.name, f"exit code {process.returncode}: {last}")

    def fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        print(f"{name}: failed: {reason}", flush=True)

    def ensembles(self) -> dict[str, Any]:
        """Test every ensemble; what alexnet eval --json prints of each. One that cannot be tested is noted as failed."""
        found: dict[str, Any] = {}
        for ensemble in self.study.ensembles:
            members, title = [run.name for run in ensemble.members], f"ensemble {ensemble.name}"
            if missing := [name for name in members if name in self.failed or name in self.diverged]:
                self.fail(title, f"its {missing[0]} {'failed' if missing[0] in self.failed else 'diverged'}")
                continue
            print(f"{title}: testing {len(members)} networks", flush=True)
            answer = subprocess.run(command("eval", *(self.folder / name for name in members), "--views", str(ensemble.views),
                                            "--json"), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
            if answer.returncode:
                self.fail(title, f"the test ended with exit code {answer.returncode}, see above")
                continue
            found[ensemble.name] = json.loads(answer.stdout)
        return found


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come: Ctrl-C, SIGTERM, a closed terminal. A second Ctrl-C ends this process at once."""
    signals: list[int] = []

    def append(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, append)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(study: Study, folder: Path) -> list[dict[str, Any]]:
    """A row for each group and point of the grid: seeds, mean and standard deviation (None for one) of the errors (shares)."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for run in study.runs:
        if test := test_of(folder / run.name):
            rows.setdefault(f"{run.group} {run.point}".strip(), []).append(test)
    return [{"name": name, "seeds": len(tests), **{
        f"{which}_{what}": value for which in ("top1", "top5") for values in [[test[which] for test in tests]]
        for what, value in (("mean", statistics.fmean(values)), ("sd", statistics.stdev(values) if len(values) > 1 else None))}}
        for name, tests in rows.items()]


def show(rows: list[dict[str, Any]], together: dict[str, Any], runs: Runs) -> None:
    """The table on stdout; what failed on stderr."""
    rows = rows + [{"name": f"ensemble {name}", "seeds": len(found["members"]), "top1_mean": found["ensemble"]["top1"],
                    "top1_sd": None, "top5_mean": found["ensemble"]["top5"], "top5_sd": None} for name, found in together.items()]
    width = max((len(row["name"]) for row in rows), default=3)
    print(f"{'run':{width}}  seeds  " + "  ".join(f"{title:16}" for title in runs.errors.values()).rstrip())
    for row in rows:
        cells = [f"{row[f'{which}_mean']:7.2%}" + (f" ± {row[f'{which}_sd']:.2%}" if row[f"{which}_sd"] is not None else "")
                 for which in runs.errors]
        print(f"{row['name']:{width}}  {row['seeds']:5d}  " + "  ".join(f"{cell:16}" for cell in cells).rstrip())
    for name in runs.diverged:
        print(f"{name} diverged")
    for name, reason in runs.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)


def run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    """Read the study, run it, test its ensembles, show what came of it. Returns the exit code; raises ValueError."""
    study = read_study(args.study, args.out.absolute(), extra)
    folder = args.out.absolute() / study.name
    if args.dry_run:
        for planned in study.runs:
            print("alexnet train " + shlex.join(planned.argv))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / ".lock")  # by this process and its runs until all of them have ended: else two would write one run
    except LockHeld as holder:
        raise ValueError(f"study folder (={folder}) is in use by {holder}, or by runs that it has left; wait until they have "
                         "ended, or end them") from None
    with held:
        runs = Runs(study, folder)
        runs.carry_out(args.jobs, held.fileno())
        rows, together = summary(study, folder), runs.ensembles()
        write_json(folder / "study.json", {"rows": rows, "ensembles": together, "diverged": runs.diverged, "failed": runs.failed})
    show(rows, together, runs)
    return 1 if runs.failed else 0


def parser(prog: str = "run_study.py") -> Parser:
    parts = (__doc__ or "").split("\n\n")
    about = "\n\n".join([*parts[:1], *parts[2:]])  # without the command line, which the example has
    top = Parser(prog=prog, former={"--runs": "--out"}, description=f"{about}\nWords after -- go to every training.",
                 example=f"{prog} tiny50 --jobs 4 -- --machine.device=cuda")
    top.add_argument("study", metavar="STUDY", help="name of a study that comes with this program, or a YAML file")
    top.add_argument("--jobs", type=at_least(1), default=1, metavar="N",
                     help="runs at once; on a CPU give each its --machine.torch_threads")
    top.add_out("folder of run folders", default=Path("runs"))
    top.add_argument("--dry-run", action="store_true", help="print the commands only")
    return top


def main(argv: Sequence[str] | None = None, prog: str = "run_study.py") -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, extra = (words[:words.index("--")], words[words.index("--") + 1:]) if "--" in words else (words, [])
    return guarded(lambda: run(parser(prog).parse_args(words), extra),
                   "interrupted; the runs are saved, and the same command resumes them")


if __name__ == "__main__":
    run_command(main)
