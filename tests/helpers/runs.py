"""Runs for tests: started as processes or in this one, and what they leave compared."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch

from model.alexnet import AlexNet
from train import build
from train.checkpoint import checkpoint
from train.main import main
from train.parallel.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
ALONE = [sys.executable, "-W", "error", "-m"]


def ranks(count: int) -> list[str]:
    """The launcher of so many processes."""
    return [sys.executable, str(ROOT / "tests/helpers/ranks.py"), str(count)]


PAIR = [*ranks(2), *ALONE]


def start(launcher: list[str], recipe: Path, runs: Path, *argv: str) -> subprocess.Popen[str]:
    return launch([*launcher, "train.main", "--config", str(recipe), f"--machine.runs={runs}", *argv])


def launch(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment)


def here(recipe: Path, runs: Path, *argv: str, code: int = 0) -> tuple[str, str]:
    """As `run` of one process, in this one: saves seconds of imports."""
    return inside(main, ["--config", str(recipe), f"--machine.runs={runs}", *argv], code)


def inside(command: Callable[[list[str]], int], argv: list[str], code: int) -> tuple[str, str]:
    """What a command prints, called in this process; signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = command(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert got == code, f"exit code {got}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def run(launcher: list[str], recipe: Path, runs: Path, *argv: str, code: int = 0) -> tuple[str, str]:
    return finish(start(launcher, recipe, runs, *argv), code)


def pair(recipe: Path, runs: Path, *argv: str, code: int = 0) -> tuple[str, str]:
    """In two processes; the launcher turns every failure into 1."""
    return run(PAIR, recipe, runs, *argv, code=min(code, 1))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint of a run."""
    path = checkpoint.checkpoints(folder / "checkpoints")[-1]
    checkpoint.verify(path)
    shapes = checkpoint.stored_shapes(path)
    found = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.load(path, found, shapes, Topology.single())
    return found


def processes(count: int, *argv: Any) -> None:
    """Run a script in so many processes; each prints "done" at its end."""
    done = subprocess.run([*ranks(count), sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and done.stdout.count("done") == count, done.stdout + done.stderr


MEASURED = ("time", "images_per_s", "waited", "waited_for", "seconds", "crc32")  # of a clock; differ from run to run


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        yield {key: value for key, value in values.items() if key not in MEASURED}


def same(one: Path, other: Path) -> None:
    """Two runs ended with the same bits, and told the same story."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and len(first) == 32
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert list(lines(one)) == list(lines(other))


def watch(monkeypatch: pytest.MonkeyPatch, look: Callable[[AlexNet], None]) -> None:
    """Show the network of the next run, when it is made, to `look`."""
    made = build.network

    def network(*args: Any) -> AlexNet:
        network = made(*args)
        look(network)
        return network
    monkeypatch.setattr(build, "network", network)
