"""Training in which one process fails at an exact moment; tools/try_faults.py starts it:

    torchrun … -m tools.fault_runner FAULT RANK STEP NOTES ARGUMENTS OF train.main …

Nothing is wrong after a restart. Each process writes NOTES/RESTART-RANK.jsonl: when it started, when it was struck, with which
code it left.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Optional

FAULTS = ("none", "kill in load", "kill in forward", "kill in exchange", "kill in backward", "kill in update", "kill in save",
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
    from train.parallel.failure import _Monitor

    struck: list[bool] = []
    phase_of, step_of = ["start"], [0]

    def strike(deed: Callable[[], object]) -> None:
        """Once, and not before its time."""
        if not struck and step_of[-1] >= step:
            struck.append(True)
            notes.write("struck", step=step_of[-1])
            deed()

    def send(number: int, pid: int) -> Callable[[], None]:
        return lambda: os.kill(pid, number)

    kill = send(signal.SIGKILL, os.getpid())
    kind, _, phase = fault.partition(" in ")
    deeds: dict[str, Callable[[], object]] = {
        "kill": kill, "stop": send(signal.SIGSTOP, os.getpid()), "SIGTERM": send(signal.SIGTERM, os.getpid()),
        "hang": lambda: time.sleep(3600), "torchrun killed": send(signal.SIGKILL, os.getppid())}
    moved = _Monitor.enter

    def at(self: _Monitor, phase_now: str, step_now: Optional[int]) -> None:
        moved(self, phase_now, step_now)
        phase_of[:], step_of[:] = [phase_now], [step_of[-1] if step_now is None else step_now]
        if phase_now == (phase or "forward") and phase not in ("exchange", "save") and kind in deeds:
            strike(deeds[kind])

    setattr(_Monitor, "enter", at)
    if phase == "exchange":
        _after_sending(lambda: strike(kill) if phase_of[-1] == "forward" else None)
    elif phase == "save":
        _before_writing(lambda: strike(deeds[kind]))
    elif kind in ("loader fails", "disk fails", "gradient is NaN"):
        {"loader fails": _loader, "disk fails": _disk, "gradient is NaN": _gradient}[kind](strike)


def _after_sending(then: Callable[[], object]) -> None:
    """When this process has begun to exchange activations with the other tower, or gradients with other pairs."""
    import torch.distributed as dist

    for name in ("batch_isend_irecv", "all_reduce"):
        def sent(*words: Any, original: Callable[..., Any] = getattr(dist, name), **named: Any) -> Any:
            works = original(*words, **named)
            then()
            return works
        setattr(dist, name, sent)


def _before_writing(then: Callable[[], object]) -> None:
    """When this process is about to write its part of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    original = dcp.FileSystemWriter.write_data

    def write_data(self: Any, *words: Any, **named: Any) -> Any:
        then()
        return original(self, *words, **named)
    setattr(dcp.FileSystemWriter, "write_data", write_data)


def _loader(strike: Callable[[Callable[[], object]], None]) -> None:
    from pipeline.loading.train_loader import TrainLoader
    from pipeline.reading.quarantine import SampleError

    original = TrainLoader.__next__

    def following(self: TrainLoader) -> Any:
        def fail() -> NoReturn:
            raise SampleError(self.index, 0, "is broken on purpose")
        strike(fail)
        return original(self)
    setattr(TrainLoader, "__next__", following)


def _disk(strike: Callable[[Callable[[], object]], None]) -> None:
    def fail() -> NoReturn:
        raise OSError(28, "No space left on device (on purpose)")
    _before_writing(lambda: strike(fail))


def _gradient(strike: Callable[[Callable[[], object]], None]) -> None:
    import torch

    from train import build

    made = build.network

    def network(*words: Any, **named: Any) -> Any:
        found: Any = made(*words, **named)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = [gradient]
            strike(lambda: spoilt.append(gradient * float("nan")))
            return spoilt[-1]
        found.conv5.weight.register_hook(spoil)
        return found
    setattr(build, "network", network)


def main(fault: str, rank: str, step: str, folder: str, argv: list[str]) -> NoReturn:
    """One process of the run."""
    restart, mine = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("RANK", "0")
    notes = Notes(Path(folder), restart, mine)
    notes.write("started")
    end = os._exit

    def left(code: int) -> NoReturn:
        notes.write("left", code=code)
        end(code)
    setattr(os, "_exit", left)
    from train.exit_codes import leave, recorded
    from train.main import main as train

    if fault != "none" and restart == "0" and rank == mine:
        install(fault, int(step), notes)
    leave(recorded(train)(argv))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="fault_runner.py", allow_abbrev=False,
                                     description="A process of a run in which a fault happens; try_faults.py starts it.")
    for word in ("fault", "rank", "step", "folder"):
        parser.add_argument(word)
    given, others = parser.parse_known_args()
    main(given.fault, given.rank, given.step, given.folder, others)
