"""Performance model of data-parallel and tower training, projected to 1 to 1,024 H200s: `python tools/scaling.py`.

step = arithmetic + update + exposed exchange of activations + exposed all-reduces of gradients. *Exposed* is what computing does
not hide: activations travel behind the product of a tower's own half (model/tower_exchange.py), the gradient of a layer from the
moment it is complete, one layer after the other, behind the rest of the backward pass (train/parallel/gradients.py). The loader
works beside all this and sets the pace where it is slower. Left out: stragglers, other users of a network, validation,
checkpoints. docs/scaling.md was written from the tables; nothing in them is measured.

Schemes: `one` process; `data`, every process a whole network; `towers`, pairs that share one, half of each layer each; `weird`,
pairs that share its fully connected layers only.
"""
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: tools/profile must not hide the standard library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.exit_codes import run_command, start_command  # noqa: E402

if __name__ == "__main__":
    start_command()

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tools.cli import guarded  # noqa: E402
from train.cli import Parser  # noqa: E402

if TYPE_CHECKING:  # --help needs no torch
    from model.config import ModelConfig

SCHEMES = ("towers", "data", "weird")
BYTES = {"fp32": 4, "bf16": 2}  # of an activation; gradients are float32 whatever the precision
UPDATE_PASSES = 12  # times the update reads or writes as much memory as the parameters take: train/optimizer.py, a norm
GPUS = (1, 2, 8, 64, 1024)
NODE = 8  # GPUs of a node
FIXED, WEAK = (128, 4096, 32768), 256  # images of a step; images of a step for each GPU (weak scaling)
KNEE = 0.8  # of the ideal speed
SETS = {"ImageNet-1k": (1_281_167, 1000), "Fall 2011": (14_197_122, 21_841)}  # images, classes
PEAK, SHARE = 989e12, 0.25  # dense bf16 FLOP/s of an H200; the share of it that the layers get
ASSUMED = f"""\
Computed, not measured. Assumed:
  layers: {SHARE:.0%} of an H200's dense bf16 peak ({PEAK / 1e12:.0f} TFLOP/s), element-wise layers included
  launches: forward and backward take at least 1 ms (some 200 kernels, launched one after the other)
  update: 4.3 TB/s of the memory's 4.8
  inside a node: NVLink at 360 of its 450 GB/s each way; 10 µs a message, 3 µs a level of an all-reduce
  between nodes: a card of 400 Gb/s for each GPU at 45 of its 50 GB/s each way, 10 µs a level"""


@dataclass(frozen=True)
class Layer:
    """A layer of the whole network, and what one tower has of it."""

    name: str
    macs: int  # multiply-adds forward for an image; backward as many for the weight, and as many for the input
    parameters: int  # weights and biases
    half: int  # those of the tower
    meets: int  # elements of an image's input of which the tower receives the other half; 0: it sees its own only

    def is_split(self, scheme: str) -> bool:
        """Whether a process holds half of it (and takes all images of the pair through that half)."""
        return scheme == "towers" or scheme == "weird" and not self.name.startswith("conv")

    @property
    def backward(self) -> int:
        """Products backward for one forward: the first layer's input needs no gradient."""
        return 1 if self.name == "conv1" else 2


def layers(config: ModelConfig, tower_rank: int = 0) -> list[Layer]:
    """conv1 … fc8, and what tower `tower_rank` (0 or 1) has of them: where classes are odd in number, tower a has one more."""
    from model.alexnet import canonical_shapes, shapes

    canonical, outputs = canonical_shapes(config), shapes(config)
    sizes, found = dict(outputs), list[Layer]()
    elements = dict(zip([name for name, _ in outputs[1:]], [math.prod(shape) for _, shape in outputs]))  # of a layer's input
    for name, layer in config.layers.items():
        rows, weights = canonical[f"{name}.weight"][0], math.prod(canonical[f"{name}.weight"])
        half = (rows + 1 - tower_rank) // 2 * (weights // rows + 1)
        meets = elements[name] if found and layer.sees == "both" else 0
        found.append(Layer(name, weights * math.prod(sizes[name][1:]), weights + rows, half, meets))
    return found


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends."""

    crossings: dict[tuple[str, str], int]  # for an image of its pair, by (layer, direction) as in model.tower_exchange
    gradients: dict[str, float]  # in a step, by layer


def traffic(config: ModelConfig, scheme: str, precision: str = "bf16", pairs: int = 1, tower_rank: int = 0) -> Traffic:
    """What a process of `pairs` pairs sends. An activation crosses once forward and its gradient once backward; a ring
    all-reduce of n processes sends 2(n − 1)/n times its bytes."""
    crossings: dict[tuple[str, str], int] = {}
    gradients = {}
    for layer in layers(config, tower_rank):
        if split := layer.is_split(scheme):
            crossings |= {(layer.name, direction): layer.meets // 2 * BYTES[precision]
                          for direction in ("forward", "backward") if layer.meets}
        ranks = pairs if split else 2 * pairs
        gradients[layer.name] = 2 * (ranks - 1) / ranks * BYTES["fp32"] * (layer.half if split else layer.parameters)
    if scheme in ("towers", "weird"):
        crossings["logits", "forward"] = (config.classes + 1 - tower_rank) // 2 * BYTES[precision]
    return Traffic(crossings, gradients)


@dataclass(frozen=True)
class Link:
    """A connection of a process, the same in both directions at once: bytes a second when all use theirs, seconds a message."""

    bytes_per_s: float
    latency_s: float

    def seconds(self, size: float) -> float:
        return size / self.bytes_per_s + self.latency_s


@dataclass(frozen=True)
class Machine:
    """Nodes of NODE GPUs."""

    flop_s: float  # floating-point operations a second of a GPU in the layers, element-wise work included in the time
    update_bytes_s: float  # memory traffic a second during the update
    launch_s: float  # forward and backward take at least so long
    pair: Link  # between two towers
    inside: Link  # of a GPU, for all-reduces inside a node
    between: Link  # of a GPU, to other nodes

    def all_reduce(self, ranks: int, nodes: int) -> Link:
        """Of `ranks` processes, evenly on so many nodes: rings for the bytes, which leave a node by the links of all its members
        at once; trees for the latency."""
        members = ranks // nodes
        levels = [math.ceil(math.log2(count)) for count in (members, nodes)]
        latency = 2 * (levels[0] * self.inside.latency_s + levels[1] * self.between.latency_s)
        between = members * self.between.bytes_per_s if nodes > 1 else math.inf
        return Link(min(self.inside.bytes_per_s, between), latency)


H200 = Machine(flop_s=SHARE * PEAK, update_bytes_s=4.3e12, launch_s=1e-3, pair=Link(360e9, 10e-6), inside=Link(360e9, 3e-6),
               between=Link(45e9, 10e-6))  # as ASSUMED


@dataclass(frozen=True)
class Step:
    """A training step of `batch` images on `gpus` GPUs, with a loader that keeps up."""

    scheme: str
    gpus: int
    batch: int
    compute_s: float
    exposed_s: float  # exchange of activations, all-reduces of gradients
    ideal: float = math.nan  # images/s of as many GPUs that share nothing; a pair may be faster: larger steps, half the update

    @property
    def images_per_s(self) -> float:
        return self.batch / (self.compute_s + self.exposed_s)

    @property
    def efficiency(self) -> float:
        return self.images_per_s / self.ideal


def predict(config: ModelConfig, machine: Machine, scheme: str, gpus: int, batch: int) -> Step:
    table, sent = layers(config), traffic(config, scheme, pairs=max(1, gpus // 2))
    # A GPU does half of each layer for the pair's images, or all of a layer for half of them: the same arithmetic.
    product = {layer.name: 2 * layer.macs * batch / gpus / machine.flop_s for layer in table}
    arithmetic = sum(product[layer.name] * (1 + layer.backward) for layer in table)
    slower = max(1.0, machine.launch_s / arithmetic)
    exchange_s = backward = reduced = 0.0  # exposed exchange; backward pass so far; when the last all-reduce ends
    for (name, direction), size in sent.crossings.items():
        # Forward: own half of the product. Backward, once the half that is sent is computed: the weights, and own half.
        window = product.get(name, 0.0) * slower * (0.5 if direction == "forward" else 1.5)  # logits: nothing hides them
        exchange_s += max(0.0, machine.pair.seconds(size * 2 * batch / gpus) - window)
    for layer in reversed(table):
        backward += product[layer.name] * slower * layer.backward
        ranks = gpus // 2 if layer.is_split(scheme) else gpus
        if ranks > 1:
            link = machine.all_reduce(ranks, max(1, gpus // NODE))
            reduced = max(reduced, backward) + link.seconds(sent.gradients[layer.name])
    held = sum(layer.half if layer.is_split(scheme) else layer.parameters for layer in table)
    update = UPDATE_PASSES * BYTES["fp32"] * held / machine.update_bytes_s
    return Step(scheme, gpus, batch, arithmetic * slower + update, exchange_s + max(0.0, reduced - backward))


def project(config: ModelConfig, machine: Machine, batch: int, weak: bool, gpus: Iterable[int] = GPUS) -> list[Step]:
    """Each scheme on so many GPUs, where they divide the batch: that of all, or (weak) of each."""
    one = predict(config, machine, "one", 1, batch).images_per_s
    steps = [predict(config, machine, scheme, count, batch * count if weak else batch) for count in gpus
             for scheme in (("one",) if count == 1 else SCHEMES) if weak or batch % count == 0]
    return [replace(step, ideal=one * step.gpus) for step in steps]


def knees(config: ModelConfig, machine: Machine, batch: int, weak: bool) -> dict[str, int]:
    """By scheme: most GPUs (a power of two, up to 4096) whose efficiency is at least KNEE."""
    steps = project(config, machine, batch, weak, [2 ** power for power in range(1, 13)])
    return {scheme: max([1, *(step.gpus for step in steps if step.scheme == scheme and step.efficiency >= KNEE)])
            for scheme in SCHEMES}


def tables() -> Iterator[str]:
    """Lines of Markdown: what is assumed, then the steps of each set and batch, and the knees."""
    from model.alexnet import paper

    yield ASSUMED
    for name, (images, classes) in SETS.items():
        for batch in (*FIXED, WEAK):
            weak = batch == WEAK
            yield f"\n{name}: {images:,} images, {classes:,} classes; {batch} images a {'GPU' if weak else 'step'}\n"
            yield "| GPUs | scheme | step ms | img/s | epoch s | exposed | efficiency |\n|---|---|---|---|---|---|---|"
            for step in project(paper(classes), H200, batch, weak):
                rate = step.images_per_s
                yield (f"| {step.gpus} | {step.scheme} | {1e3 * step.batch / rate:.2f} | {rate:,.0f} | {images / rate:,.3g} | "
                       f"{step.exposed_s * rate / step.batch:.0%} | {step.efficiency:.0%} |")
            found = knees(paper(classes), H200, batch, weak)
            yield (f"\nknee (most GPUs at {KNEE:.0%} of the ideal speed): "
                   + ", ".join(f"{scheme} {count}" for scheme, count in found.items()))


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit code."""
    parser = Parser(description="Training steps on 1 to 1,024 H200s, computed from assumed speeds.", former={"--project": ""},
                    example="python tools/scaling.py")

    def work() -> None:
        parser.parse_args(argv)
        print("\n".join(tables()))
    return guarded(work)


if __name__ == "__main__":
    run_command(main)
