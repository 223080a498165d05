"""Times ways to share a network between processes against one process: `python -m tools.bench.parallel [RECIPE]`.

Every way makes steps of the same global batch on noise, each process with one thread on one core (rank r the core r modulo their
number), where also runs what carries its bytes to others. Teams of processes, started as torchrun would and kept alive, take
turns, overlap on and off too. A turn's step is that of the slowest process; a ratio is of two turns of one round. Waiting is
measured where the product waits: for activations (`Exchange.wait`), for gradients (`GradientReducer.finish`).
"""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING, Any
from unittest import mock

from tools.bench.workers import Workers
from tools.cli import guarded
from train.cli import Parser, put_json

if TYPE_CHECKING:
    from train.config import Config
    from train.parallel.topology import Topology

RECIPE = "alexnet_ilsvrc2012"
SETTINGS = ["--machine.device=cpu", "--machine.channels_last=true", "--machine.precision=fp32", "--machine.threads=1",
            "--machine.torch_threads=1"]
WAITS = ("activations", "gradients")
# Processes of each way, and parallel settings of the recipe.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}), "towers": (2, {"towers": 2}), "data": (2, {"towers": 1}),
    "weird": (2, {"scheme": "weird"}), "towers-x-data": (4, {"towers": 2})}


# --- in a process of a team

@dataclass
class Member:
    """A process of a team."""
    topology: Topology
    steps: dict[bool, Iterator[int]]  # by overlap, without end
    waits: dict[str, float]  # seconds so far


@contextmanager
def member(rank: int, config: Config) -> Iterator[Member]:
    """Join the team and build the network."""
    from model.tower_exchange import Exchange
    from tools.profile.network import NetworkStep
    from train.parallel.gradients import GradientReducer
    from train.parallel.topology import process_group

    if config.machine.device != "cuda":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with ExitStack() as stack:
        topology = stack.enter_context(process_group(towers=config.model.towers, device=config.machine.device,
                                                     timeout_s=3600, parallel=config.parallel))
        steps = {overlap: NetworkStep(replace(config, parallel=replace(config.parallel, overlap=overlap)), topology).synthetic()
                 for overlap in ((True,) if topology.is_single else (True, False))}
        waits = dict.fromkeys(WAITS, 0.0)
        for owner, method, name in ((Exchange, "wait", WAITS[0]), (GradientReducer, "finish", WAITS[1])):
            stack.enter_context(mock.patch.object(owner, method, _timed(getattr(owner, method), waits, name)))
        yield Member(topology, steps, waits)


def _timed(method: Any, seconds: dict[str, float], name: str) -> Any:
    """The method, adding its wall time to `seconds`."""
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds[name] += time.perf_counter() - start
    return timed


def take_turn(own: Member, steps: int, overlap: bool) -> dict[str, float]:
    """So many steps, after one that is not timed, begun by all processes at once: seconds and CPU seconds of a step, and shares
    of the time spent waiting."""
    work = own.steps[overlap]
    next(work)
    own.topology.all_reduce_sum([0.0])
    waits, cpu, start = dict(own.waits), time.process_time(), time.perf_counter()
    for _ in range(steps):
        next(work)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    shares = {name: (own.waits[name] - waits[name]) / seconds for name in waits}
    return {"step_s": seconds / steps, "cpu_s": cpu / steps, **shares}


# --- the command

def team(name: str, config: Config) -> Workers:
    """The processes of a way."""
    count, settings = WAYS[name]
    config = replace(config, parallel=replace(config.parallel, **settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    print(f"starting {name}", file=sys.stderr, flush=True)
    return Workers(f"team {name}", member, [(rank, config) for rank in range(count)], environment)


def measure(config: Config, names: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Start the teams and let them take turns of some seconds; the figures of each way. Raises RuntimeError: a process failed."""
    from tools.profile.measure import interleave, ratio

    teams: dict[str, Workers] = {}
    turns: dict[tuple[str, bool], Callable[[], list[dict[str, float]]]] = {}
    try:
        for name in dict.fromkeys(["one", *names]):
            teams[name] = team(name, config)
            for overlap in (True, False) if WAYS[name][0] > 1 else (True,):
                step_s = max(rank["step_s"] for rank in teams[name].call(take_turn, 1, overlap))  # not counted
                turns[name, overlap] = partial(teams[name].call, take_turn, max(1, round(seconds / step_s)), overlap)
        labels = {name + ("" if overlap else ", no overlap"): turn for (name, overlap), turn in turns.items()}
        results = interleave(labels, rounds)
    finally:
        for workers in teams.values():
            workers.close()
    step_s = {label: [max(rank["step_s"] for rank in ranks) for ranks in found] for label, found in results.items()}
    return [{"name": label, "processes": len(found[0]), "step_s": step_s[label],
             "images_per_s": [config.train.batch / seconds for seconds in step_s[label]],
             "cpu_s": [sum(rank["cpu_s"] for rank in ranks) for ranks in found],
             "ratio": ratio(step_s["one"], step_s[label])._asdict(),
             "waits": {name: median(fmean(rank[name] for rank in ranks) for ranks in found) for name in WAITS}}
            for label, found in results.items()]


def show(entries: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Steps of the same global batch; activations, gradients: share of the time spent waiting for them")
    for column in ("way", "img/s", "÷ one", "smallest–largest", "CPU s a step", "activations", "gradients"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for entry in entries:
        ratio = entry["ratio"]
        table.add_row(entry["name"], f"{median(entry['images_per_s']):.1f}", f"{ratio['median']:.2f}",
                      f"{ratio['least']:.2f}–{ratio['most']:.2f}", f"{median(entry['cpu_s']):.3f}",
                      *(f"{share:.1%}" for share in entry["waits"].values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def run(args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for name in ("rounds", "seconds", "batch"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be positive; leave it out for the default")
    for name in args.ways:
        if name not in WAYS:
            raise ValueError(f"--ways (={name}) must be among {', '.join(WAYS)}; correct the command line")
    import torch

    from tools.bench.report import hardware
    from train.recipe import parse

    config = parse([args.recipe, *SETTINGS, f"--train.batch={args.batch}", *settings]).config
    if config.machine.precision == "fp64":
        raise ValueError("machine.precision (=fp64) is for comparing results; measure fp32 or bf16")
    if config.train.batch % 4:
        raise ValueError(f"--batch (={config.train.batch}) must be a multiple of 4, which all ways can divide; round it")
    about = {"batch": config.train.batch, "precision": config.machine.precision, "channels_last": config.machine.channels_last,
             "input_px": config.model.input_px, "device": config.machine.device, "torch": torch.__version__, **hardware(),
             "load_before": os.getloadavg()[0], "rounds": args.rounds, "seconds_a_turn": args.seconds}
    entries = measure(config, args.ways, args.rounds, args.seconds)
    if not put_json(args.json, {"about": about, "ways": entries}):
        show(entries)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 with a message on stderr."""
    parser = Parser(
        prog="python -m tools.bench.parallel", former={"--config": ""},
        usage="python -m tools.bench.parallel [RECIPE] [--group.key=value …] [options]",
        description="Time ways to share a network between processes against one process.",
        example="python -m tools.bench.parallel demo --batch 64 --machine.precision=bf16")
    parser.add_argument("recipe", nargs="?", default=RECIPE, metavar="RECIPE",
                        help="network and settings; --group.key=value sets one")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images of a step, of all processes together")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="length of a turn")
    parser.add_argument("--ways", type=lambda text: text.split(","), metavar="NAMES", default=list(WAYS),
                        help=f"these, divided by commas, and `one` (default: {','.join(WAYS)})")
    parser.add_json()
    return guarded(lambda: run(*parser.parse_settings(arguments)))


if __name__ == "__main__":
    run_command(main)
