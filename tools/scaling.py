"""What many processes would give: `python tools/scaling.py --measure` checks the model of a step here, `--project` puts other
machines into it.

The one concept: one model (`tools.scaling_model`). `--measure` calibrates this machine (one process on two smaller batches,
alone and with another beside it; messages between two processes), predicts what tools/bench/parallel.py measures in the same
minutes, and compares: exit code 1 when a way is off by more than LIMIT. `--project`: `tools.scaling_gpus`. docs/scaling.md is
written from both.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from model.config import ModelConfig
    from tools.bench.parallel import Result, Side
    from tools.bench.teams import LinkTimes, Team
    from tools.scaling_model import Link, Machine, Step, Way
    from train.config import Config

LIMIT = 0.20


# --- this machine

@dataclass
class Samples:
    """What was found, round by round.

    Attributes:
        alone: seconds of a step with so many images a process, on one core.
        busy: the same in two processes at once, the slower one.
        links: of messages.
    """

    alone: dict[int, list[float]]
    busy: dict[int, list[float]]
    links: list[LinkTimes]

    def machine(self, model: ModelConfig, busy: bool, cores: int) -> Machine:
        """The machine that the medians make: busy, when more than one process computes."""
        from tools.scaling_model import UPDATE_PASSES, Machine, flops, layers

        (few, few_s), (many, many_s) = sorted((images, statistics.median(times))
                                              for images, times in (self.busy if busy else self.alone).items())
        image_s = (many_s - few_s) / (many - few)
        update_s = max(1e-9, few_s - few * image_s)
        update_bytes = UPDATE_PASSES * 4 * sum(layer.parameters for layer in layers(model))
        pair, inside = (fit([statistics.median(times) for times in zip(*found)])
                        for found in ([link.exchange for link in self.links], [link.total for link in self.links]))
        inside = replace(inside, latency_s=inside.latency_s / 2)  # a sum over two is there and back
        return Machine(flops(model) / image_s, update_bytes / update_s, 0.0, cores, pair, inside, inside)


def fit(seconds: Sequence[float]) -> Link:
    """The link on which messages of LINK_BYTES take these seconds, carried by the core that computes: the smallest gives the
    latency, the largest the speed."""
    from tools.bench.teams import LINK_BYTES
    from tools.scaling_model import Link
    return Link(LINK_BYTES[-1] / max(1e-9, seconds[-1] - seconds[0]), seconds[0], 1.0)


def way_of(side: Side, config: Config) -> Way:
    """A side of the bench as the model knows it."""
    from tools.scaling_model import Way
    return Way(side.sharing.processes, side.sharing.towers, side.sharing.parallel.scheme, config.train.batch,
               overlap=side.overlap, precision=config.machine.precision)


@dataclass(frozen=True)
class Checked:
    """A way, predicted and measured: seconds of a step."""

    name: str
    predicted: Step
    measured_s: float

    @property
    def error(self) -> float:
        """How much longer than measured it was predicted, as a share."""
        return self.predicted.seconds / self.measured_s - 1


def measure(config: Config, chosen: Sequence[Side], rounds: int, seconds: float) -> tuple[list[Checked], dict[str, Machine]]:
    """Calibrate and bench in turns, then predict.

    Raises:
        RuntimeError: a process failed.
    """
    from tools.bench.parallel import measure as bench
    from tools.scaling_model import predict

    cores = len(os.sched_getaffinity(0))
    sizes = (config.train.batch // 4, config.train.batch // 2)  # images of a process
    samples = Samples({size: [] for size in sizes}, {size: [] for size in sizes}, [])

    def calibrate(teams: dict[str, Team], number: int) -> None:
        for size in sizes:
            samples.alone[size].append(teams["one"].turn(2, batch=size)[0].step_s)
            samples.busy[size].append(max(turn.step_s for turn in teams["apart"].turn(2, batch=2 * size)))
        samples.links += teams["towers"].link()[:1]
    results: list[Result] = bench(config, chosen, rounds, seconds, extra=calibrate)
    machines = {name: samples.machine(config.model, busy, cores) for name, busy in (("one process", False), ("several", True))}
    checked = []
    for result in results:
        if not result.side.sharing.apart:
            machine = machines["one process" if result.side.sharing.processes == 1 else "several"]
            checked.append(Checked(result.side.name, predict(config.model, way_of(result.side, config), machine),
                                   statistics.median(result.step_s)))
    return checked, machines


# --- the command

def show_checked(checked: Sequence[Checked], machines: dict[str, Machine]) -> None:
    """What was calibrated; predicted against measured."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, machine in machines.items():
        links = "; ".join(f"{what} {link.bytes_per_s / 1e9:.2f} GB/s, {1e6 * link.latency_s:.0f} µs"
                          for what, link in (("exchange", machine.pair), ("sums", machine.inside)))
        console.print(f"{name}: {machine.flop_s / 1e9:.1f} GFLOP/s a process; update {machine.update_bytes_s / 1e9:.1f} GB/s; "
                      f"{links}", highlight=False)
    table = Table(title="seconds of a step", title_justify="left")
    for column in ("way", "compute", "activations", "gradients", "predicted", "measured", "off by"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for one in checked:
        step = one.predicted
        seconds = (step.compute_s, step.exchange_s, step.gradients_s, step.seconds, one.measured_s)
        table.add_row(one.name, *(f"{part:.3f}" for part in seconds), f"{one.error:+.1%}")
    console.print(table)
    worst = max(abs(one.error) for one in checked)
    console.print(f"largest error {worst:.1%}: {'within' if worst <= LIMIT else 'not within'} {LIMIT:.0%}", highlight=False)


def run(asked: argparse.Namespace) -> bool:
    """Whether the model held (or was not asked)."""
    from tools.bench.parallel import WAYS, about, read, sides
    from tools.scaling_gpus import ASSUMED, projections, sensitivity, show

    found: dict[str, Any] = {}
    held = True
    if asked.measure:
        config, chosen = read(asked), sides(WAYS)
        found["about"] = about(config)
        checked, machines = measure(config, chosen, asked.rounds, asked.seconds)
        show_checked(checked, machines)
        held = max(abs(one.error) for one in checked) <= LIMIT
        found |= {"machines": {name: asdict(machine) | {"loader_img_s": None} for name, machine in machines.items()},
                  "checked": [{"name": one.name, "predicted_s": one.predicted.seconds, "measured_s": one.measured_s,
                               "error": one.error} for one in checked]}
    if asked.project:
        found |= {"assumed": ASSUMED, "projections": projections(), "sensitivity": sensitivity()}
        show(found["projections"], found["sensitivity"])
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return held


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0; 1 when a prediction is off by more than LIMIT; 2 with a message on stderr."""
    from tools.bench.parallel import parser
    from tools.cli import guarded

    made = parser("scaling.py", "Predict steps of many processes; check the predictions here.")
    made.add_argument("--measure", action="store_true", help="calibrate this machine, bench it, compare")
    made.add_argument("--project", action="store_true", help="H200s with NVLink and 400 Gb/s, 1 to 1024 of them")
    made.set_defaults(rounds=3)
    asked, settings = made.parse_known_args(arguments)
    asked.settings = settings
    if not (asked.measure or asked.project):
        made.error("--measure or --project (=none) must be given; give one or both")
    if settings and not asked.measure:
        made.error(f"{settings[0]} is a setting of the recipe that --measure takes; leave it out")
    held: list[bool] = []
    return guarded(lambda: held.append(run(asked))) or int(not held[0])


if __name__ == "__main__":
    sys.exit(main())
