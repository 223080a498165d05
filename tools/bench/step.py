"""Times the training step of a recipe's network against plain eager PyTorch: `python -m tools.bench.step [RECIPE]`.

The same layers, batch and device, on noise. Plain: nn.Conv2d, nn.LocalResponseNorm, nn.Dropout, torch.optim.SGD, as one writes
them; once as PyTorch does by default (float32, NCHW), once with the precision and the memory format of the recipe. Ours: the
training loop's own step, likewise. They take turns in one process; ratios are of two turns of one round, CPU time is of all
threads. Further words (--machine.precision=fp32) are settings of the recipe. Exit code 0, or 2 with a message."""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import argparse
from pathlib import Path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tools.cli import guarded
from train.cli import Parser

if TYPE_CHECKING:
    from torch import nn

    from train.config import Config
    from train.parallel.topology import Topology

RECIPE = "alexnet_ilsvrc2012"
DEFAULT: dict[str, Any] = {"precision": "fp32", "channels_last": False}  # PyTorch's


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


def our_steps(config: Config, topology: Topology) -> Iterator[int]:
    from tools.profile.network import NetworkStep

    return NetworkStep(config, topology).synthetic()


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    for name in ("rounds", "seconds"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} (={getattr(args, name)}) must be positive; leave it out")
    from tools.profile.measure import Workload, measure, ratio, spread
    from train import build
    from train.parallel.topology import process_group
    from train.recipe import parse

    recipe = parse([args.recipe, *words]).config
    ways: dict[str, tuple[Callable[[Config, Topology], Iterator[int]], Config]] = {}
    stated = replace(recipe.machine, **DEFAULT)
    for title, machine in (("PyTorch's defaults", stated), ("as the recipe says", recipe.machine)):
        if machine != stated or not ways:
            ways |= {f"{who}, {title}": (steps, replace(recipe, machine=machine))
                     for who, steps in (("plain", plain_steps), ("ours", our_steps))}
    with process_group(towers=1, device=recipe.machine.device, timeout_s=86400) as topology:
        build.configure_torch(recipe, topology)
        found = measure([Workload(name, steps(config, topology)) for name, (steps, config) in ways.items()],
                        args.seconds, args.rounds)
    machine = recipe.machine
    print(f"{Path(args.recipe).stem}, batch {recipe.train.batch}, on {topology.device}; the recipe says {machine.precision}, "
          f"channels_last {str(machine.channels_last).lower()}; n = {args.rounds}, median (least–most)")
    first = next(iter(found.values()))
    for name, figures in found.items():
        rate, cpu, times = spread(figures.rates), spread(figures.cpu_ms), ratio(figures.rates, first.rates)
        print(f"{name:28} {rate.median:9,.1f} ({rate.least:,.1f}–{rate.most:,.1f}) img/s  {cpu.median:7.2f} CPU ms an image  "
              f"× {times.median:.2f} ({times.least:.2f}–{times.most:.2f})")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tools.bench.step", former={"--config": ""}, description=__doc__,
                    usage="python -m tools.bench.step [RECIPE] [--group.key=value …] [options]",
                    example="python -m tools.bench.step demo --rounds 3 --train.batch=64")
    parser.add_argument("recipe", nargs="?", default=RECIPE, metavar="RECIPE", help="network and settings")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of a turn, at least two steps")
    return guarded(lambda: run(*parser.parse_settings(arguments)))


if __name__ == "__main__":
    run_command(main)
