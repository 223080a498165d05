"""Times training steps of a recipe's network: plain PyTorch's, ours, and ours shared between processes:
`python -m tools.bench.step [RECIPE]`.

Every way makes steps of the same global batch on noise. Plain: nn.Conv2d, nn.LocalResponseNorm, nn.Dropout, torch.optim.SGD, as
one writes them. Ours: the training loop's own step. Each way has processes of its own, started as torchrun would and kept alive;
they take turns. A turn's step is that of the slowest process; a ratio is of two turns of one round.
With --machine.torch_threads=1 process r runs on core r alone, with what carries its bytes to others.
Further words (--machine.precision=fp32) are settings of the recipe. Exit code 0, or 2 with a message."""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.workers import Workers
from tools.cli import guarded, hardware, versions
from train.cli import Parser, at_least, positive, put_json

if TYPE_CHECKING:
    from torch import nn

    from train.config import Config
    from train.parallel.topology import Topology

RECIPE = "alexnet_ilsvrc2012"


@dataclass(frozen=True)
class Way:
    """A way to make a step. Settings are of the recipe's groups, in place of its own."""
    processes: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


WAYS = {
    "plain": Way(plain=True, machine={"precision": "fp32", "channels_last": False}),  # PyTorch's defaults
    "plain-recipe": Way(plain=True),  # precision and memory format of the recipe
    "one": Way(), "halves": Way(machine={"tower_convs": "halves"}),
    "towers": Way(2, {"towers": 2}), "data": Way(2, {"towers": 1}), "weird": Way(2, {"scheme": "weird"}),
    "towers-x-data": Way(4, {"towers": 2})}


def plain_network(config: Config) -> nn.Sequential:
    """The recipe's layers (ReLU, LRN after it, every layer that sees its own tower as two groups) from torch.nn."""
    from torch import nn

    from model.alexnet import canonical_shapes

    model, layers = config.model, list[nn.Module]()
    inputs, shapes = 3, canonical_shapes(config.model)
    for name, conv in model.convs.items():
        layers += [nn.Conv2d(inputs, conv.kernels, conv.px, conv.stride, conv.pad, groups=inputs // shapes[f"{name}.weight"][1]),
                   nn.ReLU(inplace=True)]
        if conv.lrn != "none" and model.lrn is not None:
            layers.append(nn.LocalResponseNorm(model.lrn.n, model.lrn.alpha * model.lrn.n, model.lrn.beta, model.lrn.k))
        if conv.pool:
            layers.append(nn.MaxPool2d(model.pool.px, model.pool.stride))
        inputs = conv.kernels
    layers.append(nn.Flatten())
    for name, full in model.fulls.items():
        neurons, inputs = shapes[f"{name}.weight"]
        layers.append(nn.Linear(inputs, neurons))
        if name != model.last:
            layers += [nn.ReLU(inplace=True), nn.Dropout(model.dropout if full.dropout else 0.0)]
    return nn.Sequential(*layers)


def plain_steps(config: Config, topology: Topology, *, compiled: bool = False, wait: bool = True) -> Iterator[int]:
    """Training steps of the plain network (`compiled`: by torch.compile) on noise, without end; each `wait`s for the device."""
    import torch
    from torch.nn import functional

    from train import build

    device, last = topology.device, torch.channels_last if config.machine.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    network = plain_network(config).to(device=device, memory_format=last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), config.optimizer.lr, config.optimizer.momentum,
                                weight_decay=config.optimizer.weight_decay)
    run = torch.compile(network) if compiled else network
    batch, side, autocast = config.train.batch, config.data.crop_px, build.autocast(config, topology)
    images = (torch.randn(batch, 3, side, side) * 50).to(device, memory_format=last)
    labels = torch.randint(config.model.classes, (batch,)).to(device)
    while True:
        with autocast():
            logits = run(images)
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if wait:
            loss.item()
        yield batch


# --- in a process of a way

@contextmanager
def member(rank: int, way: Way, config: Config) -> Iterator[tuple[Topology, Iterator[int]]]:
    """Join the other processes and build the network: its steps, without end."""
    from tools.profile.network import NetworkStep
    from train import build
    from train.parallel.topology import process_group

    if config.machine.device != "cuda" and config.machine.torch_threads == 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    with process_group(towers=config.model.towers, device=config.machine.device, timeout_s=3600,
                       parallel=config.parallel) as topology:
        build.configure_torch(config, topology)
        yield topology, plain_steps(config, topology) if way.plain else NetworkStep(config, topology).synthetic()


def take_turn(own: tuple[Topology, Iterator[int]], steps: int) -> tuple[float, float]:
    """So many steps, after one that is not timed, begun by all processes at once: seconds and CPU seconds of a step."""
    topology, work = own
    next(work)
    topology.all_reduce_sum([0.0])
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(steps):
        next(work)
    return (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps


# --- the command

def start(name: str, config: Config) -> Workers:
    """The processes of a way."""
    way = WAYS[name]
    config = replace(config, parallel=replace(config.parallel, **way.parallel), machine=replace(config.machine, **way.machine))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": str(way.processes), "LOCAL_WORLD_SIZE": str(way.processes), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port}
    environment = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if way.processes > 1 else {}
                   for rank in range(way.processes)]
    print(f"starting {name}", file=sys.stderr, flush=True)
    return Workers(f"way {name}", member, [(rank, way, config) for rank in range(way.processes)], environment)


def measure(config: Config, names: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Start the ways and let them take turns of some seconds; the figures of each. Raises RuntimeError: a process failed."""
    from tools.profile.measure import interleave, ratio, spread

    with ExitStack() as stack:
        turns = {}
        for name in names:
            workers = start(name, config)
            stack.callback(workers.close)
            step_s = max(step_s for step_s, _ in workers.call(take_turn, 1))  # not counted
            turns[name] = partial(workers.call, take_turn, max(1, round(seconds / step_s)))
        results = interleave(turns, rounds)
    step_s = {name: [max(step_s for step_s, _ in turn) for turn in found] for name, found in results.items()}
    return [{"name": name, "processes": WAYS[name].processes, "step_s": step_s[name],
             "images_per_s": spread([config.train.batch / seconds for seconds in step_s[name]])._asdict(),
             "cpu_s": spread([sum(cpu_s for _, cpu_s in turn) for turn in found])._asdict(),
             "ratio": ratio(step_s[names[0]], step_s[name])._asdict()} for name, found in results.items()]


def run(args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Measure, print, write. Raises ValueError or RuntimeError."""
    for name in args.ways:
        if name not in WAYS:
            raise ValueError(f"--ways (={name}) must be among {', '.join(WAYS)}; correct the command line")
    from train.recipe import parse

    config = parse([args.recipe, *settings]).config
    machine, shared = config.machine, max(WAYS[name].processes for name in args.ways)
    if config.train.batch % shared:
        raise ValueError(f"train.batch (={config.train.batch}) must be a multiple of {shared}, as so many processes share it; "
                         "round it")
    about = {"recipe": Path(args.recipe).stem, "batch": config.train.batch, "precision": machine.precision,
             "channels_last": machine.channels_last, "input_px": config.model.input_px, "device": machine.device,
             "rounds": args.rounds, "seconds_a_turn": args.seconds, "hardware": hardware(), "versions": versions()}
    entries = measure(config, list(dict.fromkeys(args.ways)), args.rounds, args.seconds)
    if put_json(args.json, {"about": about, "ways": entries}):
        return
    print(f"{about['recipe']}, batch {config.train.batch}, on {machine.device}; the recipe says {machine.precision}, "
          f"channels_last {str(machine.channels_last).lower()}; n = {args.rounds}, median (least–most)")
    for entry in entries:
        rate, times = entry["images_per_s"], entry["ratio"]
        print(f"{entry['name']:13} {rate['median']:9,.1f} ({rate['least']:,.1f}–{rate['most']:,.1f}) img/s  "
              f"{1e3 * entry['cpu_s']['median'] / config.train.batch:7.2f} CPU ms an image  "
              f"× {times['median']:.2f} ({times['least']:.2f}–{times['most']:.2f})")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = Parser(prog="python -m tools.bench.step", former={"--config": ""}, description=__doc__,
                    usage="python -m tools.bench.step [RECIPE] [--group.key=value …] [options]",
                    example="python -m tools.bench.step demo --ways one,towers,data --train.batch=64 --machine.torch_threads=1")
    parser.add_argument("recipe", nargs="?", default=RECIPE, metavar="RECIPE", help="network and settings")
    parser.add_argument("--ways", type=lambda text: text.split(","), metavar="NAMES", default="plain,plain-recipe,one",
                        help=f"some of {', '.join(WAYS)}, divided by commas; × is over the first")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="turns of each")
    parser.add_argument("--seconds", type=positive, default=4.0, metavar="S", help="length of a turn")
    parser.add_json()
    return guarded(lambda: run(*parser.parse_settings(arguments)))


if __name__ == "__main__":
    run_command(main)
