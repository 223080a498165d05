"""Bytes that cross between processes: `python tools/exchange_bytes.py [--config RECIPE] [--batch 128] [--measure]`.

For each scheme of parallel.scheme, and for data parallel (parallel.towers: 1), what one process sends: at each layer where towers
meet, for each image of its pair, and for the gradients, in each step. With `--measure` two processes train a step and a hook on
torch.distributed counts; numbers that differ from the computed ones are an error (exit code 2).

An activation crosses once forward and its gradient once backward, in the precision of the network. Gradients of weights are
float32; a ring all-reduce of n processes sends 2(n - 1)/n times their bytes.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from model.config import ModelConfig

SCHEMES = ("towers", "weird", "data")
BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4
IMAGES = 2  # of a measured step


@dataclass(frozen=True)
class Traffic:
    """What one process sends.

    Attributes:
        crossings: bytes for each image of the pair, by (layer, direction) as in model.tower_exchange; none in data parallel.
        gradients: bytes of a step.
    """

    crossings: dict[tuple[str, str], int]
    gradients: int

    @property
    def image(self) -> int:
        """Bytes for each image of the pair, forward and backward."""
        return sum(self.crossings.values())

    def step(self, batch: int) -> int:
        """Bytes of a step with so many images per pair."""
        return batch * self.image + self.gradients

    def same_at(self, other: Traffic) -> float:
        """The images per pair with which the other sends as much; below it the one with fewer gradients sends less."""
        per_image = self.image - other.image
        return (other.gradients - self.gradients) / per_image if per_image else math.inf


def computed(config: ModelConfig, scheme: str, precision: str, pairs: int = 1, tower_rank: int = 0) -> Traffic:
    """What a process of `pairs` pairs sends; where classes are odd in number, tower a (rank 0) sends one more logit."""
    from model.alexnet import canonical_shapes, shapes
    from model.towers import Tower, tower_shape

    tower = Tower(tower_rank, 2)
    size = {name: math.prod(shape) for name, shape in shapes(config)}
    seen = {"conv3": size["pool2"], "fc6": size["pool5"], "fc7": size["fc6"], "fc8": size["fc7"]}
    crossings = {}
    if scheme != "data":
        for name, elements in seen.items():
            if scheme == "towers" or not name.startswith("conv"):
                for direction in ("forward", "backward"):
                    crossings[name, direction] = elements // 2 * BYTES[precision]
        start, stop = tower.rows(config.classes)
        crossings["logits", "forward"] = (stop - start) * BYTES[precision]

    total = 0
    for name, shape in canonical_shapes(config).items():
        split = scheme == "towers" or (scheme == "weird" and name.startswith("fc"))
        total += _ring(GRADIENT_BYTES * math.prod(tower_shape(shape, tower) if split else shape), pairs * (1 if split else 2))
    return Traffic(crossings, total)


def _ring(size: int, processes: int) -> int:
    """Bytes that each of so many processes sends to sum `size` bytes, on average."""
    return round(2 * (processes - 1) / processes * size)


def measured(config: ModelConfig, cases: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Traffic]]:
    """What each of two processes really sends in a step, for each case of (scheme, precision)."""
    import torch
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (config, tuple(cases), folder), nprocs=2)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {case: [half[case] for half in found] for case in cases}


def _process(rank: int, config: ModelConfig, cases: tuple[tuple[str, str], ...], folder: str) -> None:
    """One of the two processes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save({case: _step(config, *case, rank) for case in cases}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _step(config: ModelConfig, scheme: str, precision: str, rank: int) -> Traffic:
    """Forward and backward of IMAGES images per pair under a hook that counts."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn import functional
    from torch.utils._python_dispatch import TorchDispatchMode

    from model.alexnet import AlexNet
    from model.tower_exchange import crossing
    from model.towers import BOTH, Tower
    from train.parallel.topology import Topology
    from train.parallel.gradients import Gradients

    class Hook(TorchDispatchMode):
        """Counts the bytes of each message to the other tower, and of each all-reduce."""

        def __init__(self) -> None:
            super().__init__()
            self.sent: Counter[tuple[str, str]] = Counter()
            self.summed = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            c10d = torch.ops.c10d
            if function is c10d.send.default:
                (tensor,), _, _, tag = args
                self.sent[crossing(tag)] += tensor.nbytes
            elif function is c10d.allreduce_.default:
                self.summed += _ring(sum(tensor.nbytes for tensor in args[0]), dist.ProcessGroup.unbox(args[1]).size())
            elif function.namespace == "c10d" and function is not c10d.recv_.default:
                raise RuntimeError(f"collective (={function}) is not among those that are counted; add it")
            return function(*args, **(kwargs or {}))

    data = scheme == "data"
    mesh = init_device_mesh("cpu", (2, 1) if data else (1, 2), mesh_dim_names=("data", "tower"))
    place = (rank, 2, 0, 1) if data else (0, 1, rank, 2)
    where = Topology(*place, rank, 2, torch.device("cpu"), mesh)
    network = AlexNet(config, seed=0, tower=BOTH if data else Tower(rank, 2, where.group("tower")),
                      scheme="weird" if scheme == "weird" else "towers")
    gradients = Gradients(network, where, overlap=True)
    images = torch.zeros(IMAGES if scheme == "towers" else IMAGES // 2, 3, config.input_px, config.input_px)
    with Hook() as hook:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images, step=0)
        gradients.begin(last=True)
        functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
        gradients.finish()
    assert not any(count % IMAGES for count in hook.sent.values())
    return Traffic({key: count // IMAGES for key, count in hook.sent.items()}, hook.summed)


def check(config: ModelConfig, precision: str, found: dict[tuple[str, str], list[Traffic]]) -> None:
    """Raise RuntimeError, with both numbers, where measured bytes are not the computed ones."""
    for scheme in SCHEMES:
        for rank, traffic in enumerate(found[scheme, precision]):
            expected = computed(config, scheme, precision, tower_rank=0 if scheme == "data" else rank)
            if traffic != expected:
                raise RuntimeError(f"measured bytes of scheme {scheme} in process {rank} (={traffic}) must be those computed "
                                   f"(={expected}); correct computed() in tools/exchange_bytes.py")


def run(asked: argparse.Namespace) -> None:
    """Compute, measure if asked to, print."""
    from model.alexnet import paper
    from train.recipe import load

    for name in ("batch", "pairs"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name} (={getattr(asked, name)}) must be at least 1; give a positive number")
    config = load(asked.config).model if asked.config else paper()
    if config.towers != 2:
        raise ValueError(f"model.towers (={config.towers}) must be 2: one tower has nobody to meet; give another recipe")
    traffic = {scheme: computed(config, scheme, asked.precision, asked.pairs) for scheme in SCHEMES}
    counts: dict[str, Traffic] = {}
    if asked.measure:
        found = measured(config, [(scheme, asked.precision) for scheme in SCHEMES])
        check(config, asked.precision, found)
        counts = {scheme: found[scheme, asked.precision][0] for scheme in SCHEMES}
    if asked.json:
        print(json.dumps({
            "precision": asked.precision, "pairs": asked.pairs, "batch_per_pair": asked.batch, "measured": asked.measure,
            "schemes": {scheme: {
                "crossings": [{"layer": layer, "direction": direction, "bytes_per_image": size}
                              for (layer, direction), size in sent.crossings.items()],
                "bytes_per_image": sent.image, "gradient_bytes_per_step": sent.gradients,
                "bytes_per_step": sent.step(asked.batch),
                "as_much_as_data_at": None if scheme == "data" else sent.same_at(traffic["data"])}
                for scheme, sent in traffic.items()}}))
    else:
        report(traffic, counts, asked)


def report(traffic: dict[str, Traffic], counts: dict[str, Traffic], asked: argparse.Namespace) -> None:
    """The two tables and what follows from them."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    layers = Table(title=f"bytes that each process sends per image of its pair, {asked.precision}", title_justify="left")
    for heading in ("layer", "direction", "towers", "weird", *(("towers, measured", "weird, measured") if counts else ())):
        layers.add_column(heading, justify="left" if heading in ("layer", "direction") else "right")
    for key in traffic["towers"].crossings:
        layers.add_row(*key, *(f"{sent[scheme].crossings.get(key, 0):,}" for sent in (traffic, counts) if sent
                               for scheme in ("towers", "weird")))
    layers.add_section()
    layers.add_row("all", "both", *(f"{sent[scheme].image:,}" for sent in (traffic, counts) if sent
                                    for scheme in ("towers", "weird")))
    console.print(layers)

    steps = Table(title=f"bytes that each of {2 * asked.pairs} processes sends in a step, {asked.batch} images per pair",
                  title_justify="left")
    for heading in ("scheme", "activations", "gradients", *(("gradients of 2, measured",) if counts else ()), "together"):
        steps.add_column(heading, justify="left" if heading == "scheme" else "right")
    for scheme, sent in traffic.items():
        steps.add_row(scheme, f"{asked.batch * sent.image:,}", f"{sent.gradients:,}",
                      *([f"{counts[scheme].gradients:,}"] if counts else []), f"{sent.step(asked.batch):,}")
    console.print(steps)
    for ours, theirs in (("towers", "data"), ("weird", "data"), ("towers", "weird")):
        console.print(f"{ours} sends less than {theirs} below {traffic[ours].same_at(traffic[theirs]):,.0f} images per pair")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 for a mistake and for measured bytes that are not the computed ones."""
    parser = argparse.ArgumentParser(prog="exchange_bytes.py", description="Bytes that cross between processes, layer by layer.")
    parser.add_argument("--config", type=Path, metavar="RECIPE", help="network of a recipe (the paper's, 1000 classes)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images per pair in a step (128)")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="pairs of processes (1)")
    parser.add_argument("--precision", choices=sorted(BYTES), default="fp32", help="of the network (fp32)")
    parser.add_argument("--measure", action="store_true", help="count in two processes, too, and compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    from tools.cli import guarded
    asked = parser.parse_args(arguments)
    return guarded(lambda: run(asked))


if __name__ == "__main__":
    sys.exit(main())
