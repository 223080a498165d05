"""Faults, for real: processes of small runs are killed, stopped, fed with errors; what must come of it is checked.

    python tools/try_faults.py [--processes 2 4] [--times 5] [--only kill stop] [--json FILE] [--work FOLDER]

Each trial is one `torchrun --max-restarts 1` (tools/fault_runner.py): the fault, the end of all processes, the restart, the rest
of the run (after SIGTERM, and without torchrun, by --resume). Checked: exit codes; seconds from the fault to the end of the last
process; that each survivor names the one that failed; that no process and nothing in /dev/shm is left; that the weights are those
of a run that nothing happened to, to the bit. Exits with 2 when anything is not as it must be.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.cli import guarded  # noqa: E402
from tools.fault_runner import FAULTS  # noqa: E402

END_S = 5.0         # all processes must have ended so soon after a fault
ORDERLY_S = 10.0    # more, when all end in order: they save, and take their libraries down
SILENCE_S = 3.0     # what the runs allow for
HANG_S = 8.0
STRUCK = 8          # the step of the fault; checkpoints are made after 3, 6, 9 …
PATIENCE_S = 240.0  # for a whole trial
MARK = "ALEXNET_TRIAL"  # in the environment of every process of a trial
SMALL = ("--model.layers.conv1.kernels=8", "--model.layers.conv2.kernels=16", "--model.layers.conv3.kernels=16",
         "--model.layers.conv4.kernels=16", "--model.layers.conv5.kernels=8", "--model.layers.fc6.neurons=18",
         "--model.layers.fc7.neurons=16", "--train.batch=8", "--train.epochs=2",
         "--train.test_views=1", "--machine.torch_threads=1", "--machine.threads=1", "--machine.checkpoint_steps=3",
         "--machine.test_batch=8", "--machine.device=cpu", f"--machine.silence_s={SILENCE_S}")


@dataclass(frozen=True)
class Case:
    """A fault in one process of so many."""

    fault: str
    processes: int
    rank: int

    @property
    def codes(self) -> tuple[set[Optional[int]], set[int]]:
        """Exit codes that the process it happens to, and the others, may end with; None: none of its own."""
        if "kill" in self.fault.split() or self.fault.startswith("stop"):
            return {None}, {4}
        same = {"SIGTERM in backward": 75, "torchrun killed": 75, "gradient is NaN": 3}.get(self.fault, 4)
        return {same}, {same}

    @property
    def told(self) -> Optional[str]:
        """What each other process must say of it; None where it is all the same to all."""
        phase = self.fault.rpartition(" ")[2]
        at = f"error: rank {self.rank} at step " + (f"{STRUCK} in {phase}:" if phase not in ("exchange", "save", "fails") else "")
        return {"kill": f"{at}* without a word, as after kill -9", "stop": f"{at}*: stopped (SIGSTOP) for {SILENCE_S:g} s",
                "hang": f"{at}*: no progress for {HANG_S:g} s", "loader": f"{at}*is broken on purpose"}.get(self.fault.split()[0])

    @property
    def limit_s(self) -> float:
        """Seconds from the fault to the end of all."""
        more = {"stop": SILENCE_S + 1, "hang": HANG_S + 1, "SIGTERM": ORDERLY_S, "gradient": ORDERLY_S}
        return END_S + more.get(self.fault.split()[0], 0.0)


@dataclass
class Outcome:
    """One trial. `wrong`: what was not as it must be."""

    case: Case
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def make_set(folder: Path) -> Path:
    """Draw a small set; returns its index."""
    import train  # noqa: F401 (before torch: it says how idle threads wait)
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.builder import Builder
    from pipeline.index.ilsvrc import build_ilsvrc
    from pipeline.compute_stats import compute
    from pipeline.stats import stats_path
    from tools.demo import dataset as make_demo

    make_demo.make(folder, 0, 10, 8, 2, (80, 100))
    builder = Builder(folder / "index", "ilsvrc2012", jobs=1)
    build_ilsvrc(builder, train=folder / make_demo.TRAIN, val=folder / make_demo.VAL, test=None, devkit=folder / make_demo.DEVKIT)
    index = SampleIndex.load(folder / "index")
    compute(index, "train", 76).save(stats_path(index.path, 76))
    return index.path


def start(case: Case, notes: Path, argv: list[str], restarts: int = 1) -> subprocess.Popen[str]:
    """A run in which it happens, under torchrun."""
    notes.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts),
               "--nproc-per-node", str(case.processes), "-m", "tools.fault_runner", case.fault, str(case.rank), str(STRUCK),
               str(notes), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(notes)}
    log = (notes / "log").open("w", encoding="utf-8")
    with log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def marked(notes: Path) -> list[int]:
    """Processes of a trial that are there, torchrun among them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={notes}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile, or is not ours
                pass
    return found


def read_notes(notes: Path, restart: int) -> dict[int, dict[str, dict[str, Any]]]:
    """What each process of an attempt noted: rank → event → its line."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for path in notes.glob(f"{restart}-*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be on its way
        if entries:
            found[int(path.stem.split("-")[1])] = {entry["event"]: entry for entry in entries}
    return found


def watch_end(process: subprocess.Popen[str], notes: Path) -> Optional[float]:
    """Wait for torchrun. Returns the seconds from the fault to the end of the first attempt's last process; None: there was no
    fault."""
    last, deadline = 0.0, time.time() + PATIENCE_S
    while time.time() < deadline:
        there = [entry["started"]["pid"] for entry in read_notes(notes, 0).values() if _lives(entry["started"]["pid"])]
        if there:
            last = time.time()
        if process.poll() is not None and not there:
            break
        time.sleep(0.02)
    struck = [entry["struck"]["time"] for entry in read_notes(notes, 0).values() if "struck" in entry]
    return last - struck[0] if struck else None


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def digest(run: Path) -> str:
    """Hash of weights and velocities of a run's last checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    from train.checkpoint import checkpoint

    path = checkpoint.checkpoints(run / "checkpoints")[-1]
    checkpoint.verify(path)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tuple(entry.size)) for name, entry in entries.items() if hasattr(entry, "size")}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    found = hashlib.sha256(path.name.encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


class Trials:
    """Runs them in a folder.

    Args:
        work: where runs, notes and the drawn set go.
        argv: of train.main: recipe and index.
    """

    def __init__(self, work: Path, argv: list[str]) -> None:
        self._work, self._argv = work, [*argv, f"--machine.runs={work / 'runs'}"]
        self._whole: dict[int, str] = {}

    def undisturbed(self, processes: int) -> str:
        """The digest of a run of so many processes that nothing happens to."""
        if processes not in self._whole:
            name = f"whole-{processes}"
            process = start(Case("none", processes, 0), self._work / name, [*self._argv, f"--machine.name={name}"], restarts=0)
            if process.wait(PATIENCE_S):
                raise RuntimeError(f"run (={name}) failed without a fault; see {self._work / name / 'log'}")
            self._whole[processes] = digest(self._work / "runs" / name)
        return self._whole[processes]

    def run(self, case: Case) -> Outcome:
        """One trial."""
        whole, outcome = self.undisturbed(case.processes), Outcome(case)
        name = f"{case.fault.replace(' ', '-')}-{case.rank}-of-{case.processes}"
        notes, run = self._work / name, self._work / "runs" / name
        for folder in (notes, run):
            shutil.rmtree(folder, ignore_errors=True)
        argv = [*self._argv, f"--machine.name={name}"]
        argv += [f"--machine.timeout_s={HANG_S if case.fault.startswith('hang') else 60}"]
        shared = set(os.listdir("/dev/shm"))
        process = start(case, notes, argv)
        seconds = watch_end(process, notes)
        if seconds is None:
            outcome.wrong.append("the fault did not come about")
        else:
            outcome.seconds = round(seconds, 2)
            if seconds > case.limit_s:
                outcome.wrong.append(f"took {seconds:.1f} s of {case.limit_s:g}")
        self._check(case, notes, process, outcome)
        if case.fault == "torchrun killed" or case.fault.startswith("SIGTERM"):  # a stop that was asked for stays one
            start(Case("none", case.processes, 0), notes / "resumed", [*argv, "--resume"], 0).wait(PATIENCE_S)
        elif process.returncode != 0:
            outcome.wrong.append(f"torchrun ended with {process.returncode} after the restart")
        left = [path for path in sorted(set(os.listdir("/dev/shm")) - shared)
                if not path.startswith("sem.mp-") and not _in_use(Path("/dev/shm") / path)]  # semaphores of others' Python
        if left:
            outcome.wrong.append(f"left in /dev/shm: {', '.join(left)}")
        try:
            if digest(run) != whole:
                outcome.wrong.append("other weights than undisturbed")
        except (RuntimeError, OSError, IndexError) as error:
            outcome.wrong.append(f"no weights ({error})")
        return outcome

    def _check(self, case: Case, notes: Path, process: subprocess.Popen[str], outcome: Outcome) -> None:
        """Exit codes, words, and who is left."""
        its, others = case.codes
        noted = read_notes(notes, 0)
        for rank in range(case.processes):
            events = noted.get(rank, {})
            if "started" not in events:
                outcome.wrong.append(f"process {rank} has not started")
            code = events.get("left", {}).get("code")
            if code not in (its if rank == case.rank and case.fault != "torchrun killed" else others):
                outcome.wrong.append(f"process {rank} left with {code}")
        log = (notes / "log").read_text(encoding="utf-8").splitlines()
        if case.told is not None:
            words = case.told.split("*")
            speakers = sum(all(word in line for word in words) and " ends" in line for line in log)
            if speakers != case.processes - 1:
                outcome.wrong.append(f"{speakers} of {case.processes - 1} others named it")
        if left := marked(notes):
            outcome.wrong.append(f"left running: {left}")
            for pid in left:
                subprocess.run(["kill", "-9", str(pid)], check=False)
        if process.poll() is None:
            process.wait(10)


def _in_use(path: Path) -> bool:
    """Whether some process has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                return True
        except OSError:
            pass
    return False


def cases(processes: list[int], only: list[str]) -> list[Case]:
    """The table: every fault, in every process."""
    return [Case(fault, count, rank) for count in processes for fault in FAULTS if fault != "none"
            and (not only or any(word in fault for word in only))
            for rank in (range(count) if fault != "torchrun killed" else (0,))]


def work(asked: argparse.Namespace) -> None:
    """Run the trials, print the table."""
    import rich.console
    import rich.table

    folder = Path(asked.work or tempfile.mkdtemp(prefix="faults-"))
    argv = ["--config", str(asked.config), *SMALL]
    argv += [f"--data.index={asked.index or make_set(folder / 'set')}"]
    trials, outcomes = Trials(folder, argv), []
    table_of: dict[Case, list[Outcome]] = {case: [] for case in cases(asked.processes, asked.only)}
    order = [case for _ in range(asked.times) for case in table_of]
    random.Random(asked.seed).shuffle(order)
    for number, case in enumerate(order, 1):
        outcome = trials.run(case)
        outcomes.append(outcome)
        table_of[case].append(outcome)
        print(f"{number}/{len(order)} {case.fault}, process {case.rank} of {case.processes}: {outcome.seconds:.1f} s "
              f"{'; '.join(outcome.wrong) or 'as it must be'}", file=sys.stderr, flush=True)
    table = rich.table.Table("fault", "processes", "in", "good", "seconds to the end, at most", "wrong")
    for case, found in table_of.items():
        good = sum(not outcome.wrong for outcome in found)
        table.add_row(case.fault, str(case.processes), str(case.rank), f"{good}/{len(found)}",
                      f"{max(outcome.seconds for outcome in found):.1f}",
                      "; ".join(sorted({text for outcome in found for text in outcome.wrong})))
    rich.console.Console().print(table)
    if asked.json:
        Path(asked.json).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8")
    bad = sum(bool(outcome.wrong) for outcome in outcomes)
    if bad:
        raise RuntimeError(f"trials (={bad} of {len(outcomes)}) did not end as they must; see {folder}")
    if not asked.work:
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Kill, stop and feed errors to processes of small runs; check what comes of it.")
    parser.add_argument("--config", default=ROOT / "train/recipes/demo.yaml", help="a recipe; its network is made small")
    parser.add_argument("--index", help="index of a small set; drawn when not given")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--times", type=int, default=5, help="trials of each case")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only faults with one of these words in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the trials")
    parser.add_argument("--json", metavar="FILE", help="write all outcomes")
    parser.add_argument("--work", metavar="FOLDER", help="keep everything here; else in a folder that goes when all is well")
    asked = parser.parse_args(argv)
    return 1 if guarded(lambda: work(asked)) else 0


if __name__ == "__main__":
    sys.exit(main())
