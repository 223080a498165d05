"""Runs under torchrun in which one process is killed, stopped or fed with errors, and what must come of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ROOT, same

FAILING_STEP = 8   # checkpoints are made after 3, 6, 9 …
SILENCE_S = 3.0    # machine.silence_s
HANG_S = 8.0       # machine.timeout_s of the runs that hang
END_S = 15.0       # the promise: all processes have ended so soon after a fault
PATIENCE_S = 300.0  # for a whole trial
MARK = "ALEXNET_TRIAL"  # in the environment of every process of a trial


@dataclass(frozen=True)
class Case:
    """A fault in one process of so many."""

    fault: str
    processes: int
    rank: int

    def __str__(self) -> str:
        return f"{self.fault}, rank {self.rank} of {self.processes}"

    @property
    def codes(self) -> tuple[Optional[int], int]:
        """Exit codes of the process that fails (None: it has none of its own), and of the others."""
        if self.fault.startswith(("kill", "stop")):
            return None, 4
        code = {"SIGTERM in backward": 75, "torchrun killed": 75, "gradient is NaN": 3}.get(self.fault, 4)
        return code, code

    @property
    def error(self) -> Optional[tuple[str, str]]:
        """Rank and step, and cause, that each other process must print; None where all print the same, or nothing."""
        phase = self.fault.rpartition(" ")[2]
        place = f"error: rank {self.rank} at step " + (f"{FAILING_STEP} in {phase}: "
                                                       if phase not in ("exchange", "save", "fails") else "")
        causes = {"kill": "ended without an error, as after kill -9", "stop": f"stopped (SIGSTOP) for {SILENCE_S:g} s",
                  "hang": f"no progress for {HANG_S:g} s", "loader": "is broken on purpose"}
        cause = causes.get(self.fault.split()[0])
        return (place, cause) if cause else None

    @property
    def limit_s(self) -> float:
        """Seconds from the fault to the end of all."""
        return END_S + {"stop": SILENCE_S, "hang": HANG_S}.get(self.fault.split()[0], 0.0)


class Trials:
    """Runs trials in a folder.

    Args:
        folder: for runs, logs and notes.
        index: of a small set.
    """

    def __init__(self, folder: Path, index: Path) -> None:
        self._folder = folder
        self._argv = ["--config", str(write_recipe(folder, index)), f"--machine.runs={folder}", "--train.epochs=2",
                      "--train.test_views=1", "--machine.checkpoint_steps=3", f"--machine.silence_s={SILENCE_S}"]

    def undisturbed(self, processes: int) -> Path:
        """The folder of a run of so many processes in which nothing fails."""
        name = f"undisturbed-{processes}"
        if not (self._folder / name).exists():
            assert self._start(Case("none", processes, -1), name).wait(PATIENCE_S) == 0, self.log(name)
        return self._folder / name

    def log(self, name: str) -> str:
        """What all processes and torchrun of a run have printed."""
        return (self._folder / f"{name}.notes/log").read_text(encoding="utf-8")

    def run(self, case: Case, restarts: int = 1) -> float:
        """One trial: the fault, the end of all processes, the restart or else `--resume`, the rest of the run.

        Asserted: exit codes; that each surviving process names the one that failed, its step and the cause; that no process is
        left; weights and metrics of a run in which nothing failed, to the bit.

        Returns:
            Seconds from the fault to the end of the last process.
        """
        whole, name = self.undisturbed(case.processes), "-".join([*case.fault.split(), str(case.rank), str(case.processes)])
        for folder in (self._folder / name, self._folder / f"{name}.notes", self._folder / f"{name}.resumed.notes"):
            shutil.rmtree(folder, ignore_errors=True)
        settings = [f"--machine.name={name}", f"--machine.timeout_s={HANG_S if case.fault.startswith('hang') else 60}"]
        process = self._start(case, name, *settings, restarts=restarts)
        seconds = self._seconds_to_end(process, name)
        self._check(case, name)
        code, restartable = process.wait(10), case.codes[1] != 75  # a stop that was asked for stays one
        if restarts == 0 or not restartable:
            assert code != 0
            resumed = self._start(Case("none", case.processes, -1), f"{name}.resumed", *settings, "--resume")
            assert resumed.wait(PATIENCE_S) == 0, self.log(f"{name}.resumed")
        else:
            assert code == 0, self.log(name)
        same(whole, self._folder / name)
        assert seconds <= case.limit_s, f"{seconds:.1f} s to the end of all"
        return seconds

    def _start(self, case: Case, name: str, *settings: str, restarts: int = 0) -> subprocess.Popen[str]:
        notes = self._folder / f"{name}.notes"
        notes.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts),
                   "--nproc-per-node", str(case.processes), "-m", "tests.helpers.fault_runner", case.fault, str(case.rank),
                   str(FAILING_STEP), str(notes), *self._argv, *(settings or [f"--machine.name={name}"])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: str(notes)}
        with (notes / "log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)

    def _notes(self, name: str) -> dict[int, dict[str, dict[str, Any]]]:
        """What each process noted before the restart: rank → event → its line."""
        noted = {}
        for path in (self._folder / f"{name}.notes").glob("0-*.jsonl"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
            noted[int(path.stem.split("-")[1])] = {entry["event"]: entry for entry in entries}
        return noted

    def _seconds_to_end(self, process: subprocess.Popen[str], name: str) -> float:
        """Wait for torchrun. Returns the seconds from the fault to the end of the last process that was started before it."""
        last, deadline = 0.0, time.time() + PATIENCE_S
        while time.time() < deadline:
            alive = any(is_alive(events["started"]["pid"]) for events in self._notes(name).values() if "started" in events)
            last = time.time() if alive else last
            if process.poll() is not None and not alive:
                break
            time.sleep(0.02)
        failed = [events["failed"]["time"] for events in self._notes(name).values() if "failed" in events]
        assert failed, f"the fault did not come about:\n{self.log(name)}"
        return last - float(failed[0])

    def _check(self, case: Case, name: str) -> None:
        """Exit codes, errors, and processes that are left."""
        log, notes = self.log(name), self._notes(name)
        codes = {rank: notes[rank].get("left", {}).get("code") for rank in range(case.processes)}
        own, others = case.codes
        assert codes == {rank: own if rank == case.rank else others for rank in codes}, log
        if case.error is not None:
            for rank in range(case.processes):
                assert rank == case.rank or any(all(words in line for words in (*case.error, f"; rank {rank} at step "))
                                                for line in log.splitlines()), log
        left = marked(self._folder / f"{name}.notes")
        for pid in left:
            os.kill(pid, 9)
        assert not left, log


def marked(notes: Path) -> list[int]:
    """Processes of a trial that exist, torchrun among them."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={notes}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
        except OSError:  # it has ended meanwhile, or belongs to another user
            pass
    return pids


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
