"""How fast processes train that share a network, each way against one process, side by side:
`python tools/bench/parallel.py [--config RECIPE] [--json FILE]`; `--loader` takes the recipe's images instead of noise.

The one concept: every way makes steps of the same global batch, one core and one thread a process; the teams take turns,
overlap on and off too (`tools.bench.teams`). A ratio is of two turns of one round; of figures the median over the rounds counts,
with the smallest and largest beside it.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from tools.bench.teams import Sharing, Team, Turn
    from train.config import Config

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "train" / "recipes" / "alexnet_ilsvrc2012.yaml"
SETTINGS = ["--machine.device=cpu", "--machine.channels_last=true"]  # unless the command line says otherwise
WAYS = ["one", "apart", "towers", "data", "weird", "towers-x-data"]
AIM = 1.7  # two towers over one process
HALF_AIM = 0.53  # the step of one tower over that of both


@dataclass(frozen=True)
class Side:
    """What takes turns: a way to share, with overlap or without."""

    sharing: Sharing
    overlap: bool

    @property
    def name(self) -> str:
        """As in tables."""
        return self.sharing.name + ("" if self.overlap else ", no overlap")


@dataclass(frozen=True)
class Result:
    """A side's turns: for each round those of its processes.

    Attributes:
        side: which.
        batch: images of a step, of all processes together.
        rounds: turns by round, then by process.
        sent: bytes that a process sends in a step, computed: activations, gradients.
    """

    side: Side
    batch: int
    rounds: tuple[tuple[Turn, ...], ...]
    sent: tuple[int, int]

    @property
    def step_s(self) -> list[float]:
        """Seconds of a step in each round: those of the slowest process."""
        return [max(turn.step_s for turn in turns) for turns in self.rounds]

    @property
    def cpu_s(self) -> list[float]:
        """CPU seconds of a step in each round, of all processes."""
        return [sum(turn.cpu_s / turn.steps for turn in turns) for turns in self.rounds]

    def share(self, part: Callable[[Turn], float]) -> float:
        """A part of the time, as a share: mean of the processes, median of the rounds."""
        return statistics.median(statistics.fmean(part(turn) / turn.seconds for turn in turns) for turns in self.rounds)

    def ratios(self, base: Result) -> list[float]:
        """Speed over another side's, round by round."""
        return [theirs / ours for ours, theirs in zip(self.step_s, base.step_s)]

    def as_json(self, base: Result) -> dict[str, Any]:
        """Everything."""
        from tools.bench.teams import WAITS
        ratios = self.ratios(base)
        return {"name": self.side.name, "processes": self.side.sharing.processes, "overlap": self.side.overlap,
                "images_per_s": [self.batch / seconds for seconds in self.step_s], "step_s": self.step_s, "cpu_s": self.cpu_s,
                "ratio": {"median": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)},
                "waits": {name: self.share(lambda turn: turn.waits[name]) for name in WAITS},
                "carrying": self.share(lambda turn: turn.carrying_s),
                "sent_bytes": {"activations": self.sent[0], "gradients": self.sent[1]},
                "sent_bytes_per_s": sum(self.sent) / statistics.median(self.step_s)}


def sides(names: Sequence[str]) -> list[Side]:
    """Each way with overlap, and without it where anything is exchanged.

    Raises:
        ValueError: a name that is none.
    """
    from tools.bench.teams import SHARINGS
    for name in names:
        if name not in SHARINGS:
            raise ValueError(f"--ways (={name}) must be among {', '.join(SHARINGS)}; correct the command line")
    found = []
    for sharing in (SHARINGS[name] for name in dict.fromkeys(["one", *names])):
        alone = sharing.apart or sharing.processes == 1  # nothing is exchanged
        found += [Side(sharing, overlap) for overlap in ((True,) if alone else (True, False))]
    return found


def measure(config: Config, chosen: Sequence[Side], rounds: int, seconds: float, loader: bool = False,
            extra: Callable[[dict[str, Team], int], None] = lambda teams, number: None) -> list[Result]:
    """Start the teams, then let the sides take turns of some seconds; in every round another one begins.

    Args:
        loader: the recipe's images instead of noise.
        extra: called at the end of every round with the teams, by name, and its number.

    Raises:
        RuntimeError: a process failed.
    """
    from tools.bench.teams import Team

    teams: dict[str, Team] = {}
    found: dict[Side, list[tuple[Turn, ...]]] = {side: [] for side in chosen}
    try:
        for side in chosen:
            if side.sharing.name not in teams:
                print(f"starting {side.sharing.name}", file=sys.stderr, flush=True)
                teams[side.sharing.name] = Team(side.sharing, config, loader)
        # A first turn, not counted, says how many steps fill the seconds.
        first_turns = {side: teams[side.sharing.name].turn(1, overlap=side.overlap) for side in chosen}
        steps = {side: max(1, round(seconds / max(turn.step_s for turn in turns))) for side, turns in first_turns.items()}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            first = number * len(chosen) // rounds
            for side in [*chosen[first:], *chosen[:first]]:
                found[side].append(tuple(teams[side.sharing.name].turn(steps[side], overlap=side.overlap)))
            extra(teams, number)
    finally:
        for team in teams.values():
            team.close()
    return [Result(side, config.train.batch, tuple(found[side]), sent(side.sharing, config)) for side in chosen]


def sent(sharing: Sharing, config: Config) -> tuple[int, int]:
    """Bytes that a process sends in a step, computed: (activations, gradients)."""
    from tools.scaling import traffic
    if sharing.apart or sharing.processes == 1:
        return 0, 0
    found = traffic(config.model, "data" if sharing.towers == 1 else sharing.parallel.scheme, config.machine.precision,
                    pairs=sharing.processes // 2)
    pair_batch = config.train.batch * sharing.towers // sharing.processes
    return pair_batch * sum(found.crossings.values()), round(sum(found.gradients.values()))


def about(config: Config) -> dict[str, Any]:
    """What was measured, on what."""
    import torch
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                  if line.startswith("model name")), platform.machine())
    return {"batch": config.train.batch, "precision": config.machine.precision, "channels_last": config.machine.channels_last,
            "input_px": config.model.input_px, "device": config.machine.device, "torch": torch.__version__, "cpu": model,
            "cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}


def show(results: Sequence[Result]) -> None:
    """The table, and what it says of the aim."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Shares of a process's time: waiting for activations, for gradients, for the loss of all; its threads "
                  "that carry bytes. MB: sent by a process in a step.")
    for column in ("way", "img/s", "÷ one", "smallest–largest", "CPU s", "activations", "gradients", "loss", "carrying", "MB",
                   "MB/s"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for result in results:
        found = result.as_json(results[0])
        ratio, waits = found["ratio"], found["waits"]
        table.add_row(found["name"], f"{statistics.median(found['images_per_s']):.1f}", f"{ratio['median']:.2f}",
                      f"{ratio['smallest']:.2f}–{ratio['largest']:.2f}", f"{statistics.median(result.cpu_s):.3f}",
                      *(f"{share:.1%}" for share in (*waits.values(), found["carrying"])),
                      f"{sum(result.sent) / 1e6:.1f}", f"{found['sent_bytes_per_s'] / 1e6:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for result in results:
        ratio = statistics.median(result.ratios(results[0]))
        if result.side.name == "towers":
            console.print(f"two towers over one process: {ratio:.2f} (aim {AIM}), {'met' if ratio >= AIM else 'missed'}")
        if result.side.name == "half":
            console.print(f"step of one tower alone over that of both: {1 / ratio:.2f} (aim {HALF_AIM}), "
                          f"{'met' if 1 / ratio <= HALF_AIM else 'missed'}")


def read(asked: argparse.Namespace) -> Config:
    """The recipe, with the settings of the command line.

    Raises:
        ValueError: a mistake in it, or a batch that does not divide.
    """
    from train.recipe import parse
    config = parse(["--config", str(asked.config), *SETTINGS, f"--train.batch={asked.batch}", *asked.settings]).config
    if config.machine.precision == "fp64":
        raise ValueError("machine.precision (=fp64) is for comparing results; measure fp32 or bf16")
    if config.train.batch % 4:
        raise ValueError(f"--batch (={config.train.batch}) must be a multiple of 4, which all ways can divide; round it")
    return config


def run(asked: argparse.Namespace) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for name, low in (("rounds", 1), ("seconds", 0.001), ("batch", 4)):
        if not getattr(asked, name) >= low:
            raise ValueError(f"--{name} (={getattr(asked, name)}) must be at least {low}; leave it out for the default")
    config, chosen = read(asked), sides(asked.ways)
    described = about(config)
    results = measure(config, chosen, asked.rounds, asked.seconds, asked.loader)
    show(results)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"about": described | {"rounds": asked.rounds, "seconds_a_turn": asked.seconds, "loader": asked.loader},
                 "ways": [result.as_json(results[0]) for result in results]}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def listed(text: str) -> list[str]:
    """Names divided by commas."""
    return [name for name in text.split(",") if name]


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """Arguments of this command."""
    made = argparse.ArgumentParser(prog=name, description=text, epilog="Other words (--machine.precision=bf16) are settings of "
                                   "the recipe. Exit codes: 0 done, 2 a mistake or a failure, 130 Ctrl-C.")
    made.add_argument("--config", type=Path, default=RECIPE, metavar="RECIPE", help="network and settings (alexnet_ilsvrc2012)")
    made.add_argument("--batch", type=int, default=64, metavar="N", help="images of a step, of all processes together (64)")
    made.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (5)")
    made.add_argument("--seconds", type=float, default=4.0, metavar="S", help="length of a turn (4)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    made = parser("bench_parallel.py", "Time ways to share a network between processes against one process.")
    made.add_argument("--ways", type=listed, metavar="NAMES", default=WAYS,
                      help=f"these, divided by commas, and `one` ({','.join(WAYS)}; besides: half, a tower alone)")
    made.add_argument("--loader", action="store_true", help="the recipe's images instead of noise")
    from tools.cli import guarded
    asked, settings = made.parse_known_args(arguments)
    asked.settings = settings
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
