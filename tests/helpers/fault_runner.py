"""Training in which one process fails at an exact moment; tests/helpers/faults.py starts it:

    torchrun … -m tests.helpers.fault_runner FAULT RANK STEP NOTES ARGUMENTS OF train.main …

After a restart nothing fails. Each process writes NOTES/RESTART-RANK.jsonl: when it started, when it failed, its exit code.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pipeline.loading.train_loader import TrainLoader
from pipeline.reading.quarantine import SampleError
from train import build
from train.exit_codes import exit_now, with_torchrun_report
from train.main import main as train
from train.parallel.failure import _Monitor

FAULTS = ("kill in load", "kill in forward", "kill in exchange", "kill in backward", "kill in update", "kill in save",
          "stop in forward", "stop in save", "SIGTERM in backward", "loader fails", "disk fails", "gradient is NaN",
          "hang in load", "torchrun killed")


class Notes:
    """What happened in this process."""

    def __init__(self, folder: Path, restart: str, rank: str) -> None:
        self._path = folder / f"{restart}-{rank}.jsonl"

    def write(self, event: str, **values: Any) -> None:
        """One line, written before this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "pid": os.getpid(), "time": time.time(), **values}) + "\n")


def install(fault: str, step: int, notes: Notes) -> None:
    """Make this process fail at this step."""
    failed: list[bool] = []
    phase_now, step_now = "start", 0

    def fail(deed: Callable[[], object]) -> None:
        """Once, and not before its time."""
        if not failed and step_now >= step:
            failed.append(True)
            notes.write("failed", step=step_now)
            deed()

    def send(number: int, pid: int) -> Callable[[], None]:
        return lambda: os.kill(pid, number)

    kind, _, phase = fault.partition(" in ")
    deeds: dict[str, Callable[[], object]] = {
        "kill": send(signal.SIGKILL, os.getpid()), "stop": send(signal.SIGSTOP, os.getpid()),
        "SIGTERM": send(signal.SIGTERM, os.getpid()), "hang": lambda: time.sleep(3600),
        "torchrun killed": send(signal.SIGKILL, os.getppid())}
    original = _Monitor.enter

    def enter(self: _Monitor, phase_entered: str, step_entered: Optional[int]) -> None:
        nonlocal phase_now, step_now
        original(self, phase_entered, step_entered)
        phase_now, step_now = phase_entered, step_now if step_entered is None else step_entered
        if phase_now == (phase or "forward") and phase not in ("exchange", "save") and kind in deeds:
            fail(deeds[kind])

    setattr(_Monitor, "enter", enter)
    if phase == "exchange":
        after_sending(lambda: fail(deeds["kill"]) if phase_now == "forward" else None)
    elif phase == "save":
        before_writing(lambda: fail(deeds[kind]))
    elif kind in ("loader fails", "disk fails", "gradient is NaN"):
        {"loader fails": break_loader, "disk fails": break_disk, "gradient is NaN": break_gradient}[kind](fail)


def after_sending(then: Callable[[], object]) -> None:
    """Once this process has begun to exchange activations with the other tower, or gradients with other pairs."""
    for name in ("batch_isend_irecv", "all_reduce"):
        def sent(*args: Any, original: Callable[..., Any] = getattr(dist, name), **named: Any) -> Any:
            works = original(*args, **named)
            then()
            return works
        setattr(dist, name, sent)


def before_writing(then: Callable[[], object]) -> None:
    """When this process is about to write its part of a checkpoint."""
    original = dcp.FileSystemWriter.write_data

    def write_data(self: Any, *args: Any, **named: Any) -> Any:
        then()
        return original(self, *args, **named)
    setattr(dcp.FileSystemWriter, "write_data", write_data)


def break_loader(fail: Callable[[Callable[[], object]], None]) -> None:
    original = TrainLoader.__next__

    def following(self: TrainLoader) -> Any:
        def raising() -> NoReturn:
            raise SampleError(self.index, 0, "is broken on purpose")
        fail(raising)
        return original(self)
    setattr(TrainLoader, "__next__", following)


def break_disk(fail: Callable[[Callable[[], object]], None]) -> None:
    def raising() -> NoReturn:
        raise OSError(28, "No space left on device (on purpose)")
    before_writing(lambda: fail(raising))


def break_gradient(fail: Callable[[Callable[[], object]], None]) -> None:
    original = build.network

    def network(*args: Any, **named: Any) -> Any:
        made: Any = original(*args, **named)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = [gradient]
            fail(lambda: spoilt.append(gradient * float("nan")))
            return spoilt[-1]
        made.conv5.weight.register_hook(spoil)
        return made
    setattr(build, "network", network)


def main(fault: str, failing_rank: str, step: str, folder: str, *argv: str) -> NoReturn:
    """One process of the run."""
    restart, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    notes = Notes(Path(folder), restart, rank)
    notes.write("started")
    end = os._exit

    def left(code: int) -> NoReturn:
        notes.write("left", code=code)
        end(code)
    setattr(os, "_exit", left)
    if restart == "0" and rank == failing_rank:
        install(fault, int(step), notes)
    exit_now(with_torchrun_report(train)(argv))


if __name__ == "__main__":
    main(*sys.argv[1:])
