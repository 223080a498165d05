"""Whether processes change results: `python tools/same_losses.py --config RECIPE [--steps 200] [--precision fp32]`.

Trains the first steps of a recipe in one process, then in two and four, in every way to share the work, and compares the losses
of all steps with those of one process. They differ by the order of sums only. In float32 that may be enough for a recipe to go
apart: where a ReLU or a maximum stands on the edge, an image more or less flips it (tiny100.yaml: 1% of the loss after 200 steps,
and as much for one process in two pieces or in another memory format). Compare such a recipe in fp64, where nothing flips.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The rounding of a step grows as training amplifies it: some 200 steps from 1e-7 and 1e-16.
LIMITS = {"fp32": 1e-5, "fp64": 1e-10}


@dataclass(frozen=True)
class Way:
    """A way to share one run: so many processes, and their settings."""

    name: str
    processes: int
    settings: tuple[str, ...] = ()


ONE = Way("one", 1)
WAYS = {way.name: way for way in (
    Way("towers", 2), Way("towers-replicate", 2, ("feed=replicate",)), Way("towers-no-overlap", 2, ("overlap=false",)),
    Way("towers-accumulate", 2, ("accumulate=2",)), Way("data", 2, ("towers=1",)), Way("weird", 2, ("scheme=weird",)),
    Way("towers-x-data", 4), Way("towers-x-data-replicate", 4, ("feed=replicate",)), Way("data-4", 4, ("towers=1",)),
    Way("weird-x-data", 4, ("scheme=weird",)),
)}


def losses(way: Way, config: Path, steps: int, precision: str, runs: Path, more: list[str]) -> list[float]:
    """The loss of each step of a run shared in this way.

    Raises:
        RuntimeError: it did not end as asked; with what it said.
    """
    launcher = [sys.executable, "-m"]
    if way.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes), "-m"]
    command = [*launcher, "train.main", "--config", str(config), f"--machine.runs={runs}", f"--machine.name={way.name}",
               f"--machine.precision={precision}", f"--machine.stop_after={steps}", "--machine.metrics_steps=1",
               *(f"--parallel.{setting}" for setting in way.settings), *more]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    text = (runs / way.name / "metrics.jsonl")
    if "stopped and saved" not in done.stdout or not text.is_file():
        raise RuntimeError(f"run {way.name} (exit code {done.returncode}) did not get to step {steps}; it said:\n{done.stdout}"
                           f"{done.stderr}")
    found = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    return [float(line["loss"]) for line in found if line["kind"] == "step"]


def run(asked: argparse.Namespace) -> None:
    """Train in every way, compare, print. Raises RuntimeError when a loss differs by more than the limit."""
    from rich.console import Console
    from rich.table import Table

    if asked.steps < 1:
        raise ValueError(f"--steps (={asked.steps}) must be at least 1; leave it out for 200")
    if not asked.config.is_file():
        raise ValueError(f"--config (={asked.config}) must be a recipe; there is no such file")
    limit = LIMITS[asked.precision]
    ways = [WAYS[name] for name in asked.ways]
    with tempfile.TemporaryDirectory() as folder:
        def get(way: Way) -> list[float]:
            return losses(way, asked.config, asked.steps, asked.precision, Path(folder), asked.more)
        whole = get(ONE)
        apart = {way: max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(get(way), whole, strict=True))
                 for way in ways}
    if asked.json:
        print(json.dumps({"steps": len(whole), "precision": asked.precision, "first": whole[0], "last": whole[-1],
                          "largest_relative_difference": {way.name: value for way, value in apart.items()}}))
    else:
        table = Table(title=f"{len(whole)} steps in {asked.precision}: loss {whole[0]:.6f} → {whole[-1]:.6f} in one process")
        for heading in ("processes", "way", "largest relative difference of a loss"):
            table.add_column(heading)
        for way, value in apart.items():
            table.add_row(str(way.processes), way.name, f"{value:.1e}")
        Console(width=100).print(table)
    worst = max(apart, key=lambda way: apart[way])
    if apart[worst] > limit:
        raise RuntimeError(f"losses of {worst.name} (={apart[worst]:.1e} away) must equal those of one process to {limit:g} in "
                           f"{asked.precision}; report this with the recipe")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0 equal; 2 a mistake, a run that failed, or other losses."""
    parser = argparse.ArgumentParser(prog="same_losses.py",
                                     description="Compare the losses of one process with those of several.",
                                     epilog="Other words, as --group.key=value, are settings of the recipe.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="a recipe")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps compared (200)")
    parser.add_argument("--precision", choices=sorted(LIMITS), default="fp32", help="fp32: equal to 1e-5; fp64: to 1e-10 (fp32)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ways to share the work (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    from tools.cli import guarded
    asked, more = parser.parse_known_args(arguments)
    asked.more = more
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
