"""Times ways to share a network between processes against one process:
`python tools/bench/parallel.py [--config RECIPE] [--json FILE]`.

Every way makes steps of the same global batch, one core and one thread a process; teams of processes take turns, overlap on
and off too (`tools.bench.teams`). A ratio is of two turns of one round; of figures the median over the rounds counts, with the
smallest and largest beside it.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.cli import guarded  # noqa: E402  # found by the line above

if TYPE_CHECKING:
    from train.config import Config

RECIPE = Path(__file__).resolve().parents[2] / "train" / "recipes" / "alexnet_ilsvrc2012.yaml"
SETTINGS = ["--machine.device=cpu", "--machine.channels_last=true"]  # unless the command line says otherwise
WAYS = ["one", "apart", "towers", "data", "weird", "towers-x-data"]
AIM = 1.7  # two towers over one process
HALF_AIM = 0.53  # the step of one tower over that of both


def about(config: Config) -> dict[str, Any]:
    """What was measured, on what."""
    import torch

    from tools.bench.report import hardware
    machine = hardware()
    return {"batch": config.train.batch, "precision": config.machine.precision, "channels_last": config.machine.channels_last,
            "input_px": config.model.input_px, "device": config.machine.device, "torch": torch.__version__,
            "cpu": machine["cpu"], "cores": machine["cores"], "load_before": os.getloadavg()[0]}


def show(entries: Sequence[dict[str, Any]]) -> None:
    """The table, and what it says of the aims."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Shares of a process's time: waiting for activations, for gradients, for the loss of all; its threads "
                  "that carry bytes. MB: sent by a process in a step.")
    for column in ("way", "img/s", "÷ one", "smallest–largest", "CPU s", "activations", "gradients", "loss", "carrying", "MB",
                   "MB/s"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for entry in entries:
        ratio = entry["ratio"]
        table.add_row(entry["name"], f"{median(entry['images_per_s']):.1f}", f"{ratio['median']:.2f}",
                      f"{ratio['smallest']:.2f}–{ratio['largest']:.2f}", f"{median(entry['cpu_s']):.3f}",
                      *(f"{share:.1%}" for share in (*entry["waits"].values(), entry["carrying"])),
                      f"{sum(entry['sent_bytes'].values()) / 1e6:.1f}", f"{entry['sent_bytes_per_s'] / 1e6:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for entry in entries:
        ratio = entry["ratio"]["median"]
        if entry["name"] == "towers":
            console.print(f"two towers over one process: {ratio:.2f} (aim {AIM}), {'met' if ratio >= AIM else 'missed'}")
        if entry["name"] == "half":
            console.print(f"step of one tower alone over that of both: {1 / ratio:.2f} (aim {HALF_AIM}), "
                          f"{'met' if 1 / ratio <= HALF_AIM else 'missed'}")


def read(args: argparse.Namespace, settings: Sequence[str]) -> Config:
    """The recipe, with the settings of the command line.

    Raises:
        ValueError: a mistake in it, or a batch that does not divide.
    """
    from train.recipe import parse
    config = parse(["--config", str(args.config), *SETTINGS, f"--train.batch={args.batch}", *settings]).config
    if config.machine.precision == "fp64":
        raise ValueError("machine.precision (=fp64) is for comparing results; measure fp32 or bf16")
    if config.train.batch % 4:
        raise ValueError(f"--batch (={config.train.batch}) must be a multiple of 4, which all ways can divide; round it")
    return config


def run(args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    from tools.bench.teams import measure, ways
    from pipeline.files import write_json

    for name, low in (("rounds", 1), ("seconds", 0.001), ("batch", 4)):
        if not getattr(args, name) >= low:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be at least {low}; leave it out for the default")
    config, chosen = read(args, settings), ways(args.ways)
    described = about(config) | {"rounds": args.rounds, "seconds_a_turn": args.seconds}
    results = measure(config, chosen, args.rounds, args.seconds)
    entries = [result.as_json(results[0]) for result in results]
    show(entries)
    if args.json is not None:
        write_json(args.json, {"about": described, "ways": entries})


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.parallel", description="Time ways to share a network between processes against one process.",
        epilog="Other words (--machine.precision=bf16) are settings of the recipe. Exit codes: 0 done, 2 a mistake or a "
        "failure, 130 Ctrl-C.")
    parser.add_argument("--config", type=Path, default=RECIPE, metavar="RECIPE", help="network and settings (alexnet_ilsvrc2012)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of a step, of all processes together (64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="length of a turn (4)")
    parser.add_argument("--ways", type=lambda text: text.split(","), metavar="NAMES", default=WAYS,
                        help=f"these, divided by commas, and `one` ({','.join(WAYS)}; besides: half, a tower alone)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    args, settings = parser.parse_known_args(arguments)
    return guarded(lambda: run(args, settings))


if __name__ == "__main__":
    sys.exit(main())
