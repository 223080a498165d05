"""What a training step costs at least on one GPU: operations and bytes of each layer, and the images/s that follow from them:
`python -m tools.roofline` prints the tables of docs/performance.md. Computed, not measured.

limit = batch ÷ (operations ÷ rate of the tensor cores + bytes ÷ rate of the memory): no kernel overlaps another. Activations and
gradients are bfloat16, accumulated in the multiply units; master weights and velocity are float32. *Fused*: bias, activation,
LRN, pooling and dropout are part of a neighbouring kernel, so that each map is written once and read once by whoever needs it.
*Pooling apart*: as that, but pooling is a kernel of its own, torch's. *Unfused*: each of them is a kernel of its own that reads
and writes its maps, as eager PyTorch has it.
"""
from __future__ import annotations

from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command()

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.cli import guarded
from tools.scaling import layers
from train.cli import Parser

if TYPE_CHECKING:
    from model.config import ModelConfig

# Of a parameter in a step: bf16 copy read forward and backward, bf16 gradient written and read, float32 weight and velocity read
# and written, bf16 copy written.
WEIGHT_BYTES = 2 + 2 + 2 + 2 + 4 * 4 + 2
HALF = 2  # bytes of a bfloat16
BATCHES = (128, 256, 512)


@dataclass(frozen=True)
class Card:
    """A GPU: operations and bytes a second that large products and copies reach."""
    name: str
    flop_s: float  # dense bfloat16
    bytes_s: float


# Measured on a machine of that kind; of an H100 the memory is computed, as the same share of its nominal 3.35 TB/s.
CARDS = (Card("H200", 790e12, 4.3e12), Card("H100", 790e12, 3.0e12))


@dataclass(frozen=True)
class Work:
    """A layer's part of a training step, with the activation, LRN, pooling and dropout that follow it."""
    name: str
    parameters: int
    macs: int  # multiply-adds forward, for an image
    flop: int  # operations forward and backward, for an image
    fused: int  # bytes of activations and their gradients read and written, for an image
    apart: int
    unfused: int

    @property
    def weights(self) -> int:
        """Bytes of weights, gradients and velocity read and written in a step, whatever the batch."""
        return WEIGHT_BYTES * self.parameters


def work(config: ModelConfig) -> list[Work]:
    """conv1 … fc8 of the whole network."""
    from model.alexnet import shapes

    sizes = {name: math.prod(shape) for name, shape in shapes(config)}
    inputs, found = 3 * config.input_px ** 2, []
    for layer in layers(config):
        name, maps = layer.name, sizes[layer.name]
        pooled = sizes.get(name.replace("conv", "pool"), 0) if name.startswith("conv") else 0
        products = (inputs + maps) * (1 + layer.backward)  # forward, gradient of the weights and (not of conv1) of the input
        pooling = bool(pooled) * (2 * HALF * (maps + pooled) + 2 * 8 * pooled)  # places of the largest in int64
        if name in config.convs:
            normalised = config.lrn is not None and config.convs[name].lrn != "none"
            # One kernel for activation, LRN and pooling: its input and output; back its input again, and two gradients. Else the
            # activation is the convolution's, and its mask is read once.
            tail = 3 * maps + 2 * (pooled or maps) if normalised or pooled else maps
            fused = HALF * (products + tail) + 2 * pooled  # places of the largest, a byte each
            apart = HALF * (products + (5 if normalised else 1) * maps) + pooling
            kernels = 5 + 5 * normalised  # activation in place, LRN: 2 maps forward, 3 back
            unfused = HALF * (products + (kernels + 3) * maps) + pooling
        else:
            full = config.fulls[name]
            fused = apart = HALF * (products + maps * (not full.linear and name != config.last))
            kernels = 5 * (not full.linear and name != config.last) + 5 * full.dropout
            unfused = HALF * (products + (kernels + 3) * maps)  # 3: bias added in place, its gradient summed
        found.append(Work(name, layer.parameters, layer.macs, 2 * layer.macs * (1 + layer.backward), fused, apart, unfused))
        inputs = pooled or maps
    return found


@dataclass(frozen=True)
class Limit:
    """Least time of a training step, in seconds, by what it goes to."""
    batch: int
    arithmetic: float
    weights: float
    activations: float

    @property
    def images_s(self) -> float:
        return self.batch / (self.arithmetic + self.weights + self.activations)


def limit(layers: Sequence[Work], batch: int, card: Card, *, fused: bool = True) -> Limit:
    """Of a training step of `batch` images."""
    activations = sum(layer.fused if fused else layer.unfused for layer in layers)
    return Limit(batch, batch * sum(layer.flop for layer in layers) / card.flop_s,
                 sum(layer.weights for layer in layers) / card.bytes_s, batch * activations / card.bytes_s)


def tables(config: ModelConfig) -> Iterator[str]:
    """Lines of Markdown: the layers, and the limits."""
    layers = work(config)
    keys = ("parameters", "macs", "flop", "fused", "apart", "unfused")
    whole = Work("whole", *(sum(getattr(layer, key) for layer in layers) for key in keys))
    yield ("| layer | parameters | M multiply-adds, forward | MFLOP, a step | kB of activations, fused | pooling apart | "
           "unfused | MB of weights, a step |")
    yield "|---|---|---|---|---|---|---|---|"
    for layer in [*layers, whole]:
        yield (f"| {layer.name} | {layer.parameters:,} | {layer.macs / 1e6:,.1f} | {layer.flop / 1e6:,.0f} | "
               f"{layer.fused / 1e3:,.0f} | {layer.apart / 1e3:,.0f} | {layer.unfused / 1e3:,.0f} | {layer.weights / 1e6:,.1f} |")
    yield ""
    yield "| GPU | batch | arithmetic, µs | weights | activations, fused | unfused | limit, img/s, fused | unfused |"
    yield "|---|---|---|---|---|---|---|---|"
    for card in CARDS:
        for batch in BATCHES:
            best, plain = (limit(layers, batch, card, fused=fused) for fused in (True, False))
            times = (best.arithmetic, best.weights, best.activations, plain.activations)
            yield (f"| {card.name} | {batch} | {' | '.join(f'{1e6 * seconds:,.0f}' for seconds in times)} | "
                   f"{best.images_s:,.0f} | {plain.images_s:,.0f} |")


def main(words: Sequence[str]) -> int:
    """The command; returns its exit code."""
    def work() -> None:
        Parser(prog="python -m tools.roofline", description=__doc__, example="python -m tools.roofline").parse_args(words)
        from model.alexnet import paper

        print("\n".join(tables(paper())))
    return guarded(work)


if __name__ == "__main__":
    run_command(main)
