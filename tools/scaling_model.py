"""How long a training step takes when processes share it, computed: arithmetic, activations, gradients, loader.

A step runs forwards and backwards through the layers. Where towers meet, activations travel, hidden behind the product of own
ones (model/tower_exchange.py); a gradient is summed over processes from the moment it is complete, one after the other, hidden
behind
the rest of the backward pass (train/parallel/gradients.py). What is not hidden is *exposed*, and added. A link may need the
processor
itself (`busy`): that part is never hidden. The loader works beside all this; a step is as long as the slower of the two.

Left out: differences between processes (the slowest counts), other users of a network, validation, checkpoints.

Legend: B images of the global batch, P processes, T processes that hold a network together (1 or 2), D = P/T data ranks.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

from model.alexnet import canonical_shapes, output_sides
from model.config import Conv, ModelConfig
from tools.exchange_bytes import GRADIENT_BYTES, computed

# Times that an update reads or writes as much memory as the parameters take: four passes of train/optimizer.py, a norm.
UPDATE_PASSES = 12


@dataclass(frozen=True)
class Layer:
    """One layer of the whole network.

    Attributes:
        macs: multiply-adds forward for an image; backward takes as many for the weight, and as many for the input.
        parameters: weights and biases.
        first: its input needs no gradient.
        conv: convolution, or fully connected.
    """

    name: str
    macs: int
    parameters: int
    first: bool
    conv: bool


def layers(config: ModelConfig) -> list[Layer]:
    """conv1 … fc8."""
    shapes, px = canonical_shapes(config), dict(output_sides(config))
    found: list[Layer] = []
    for name, layer in config.layers.items():
        weight, outputs = math.prod(shapes[f"{name}.weight"]), shapes[f"{name}.bias"][0]
        conv = isinstance(layer, Conv)
        places = px[name] ** 2 if conv else 1
        found.append(Layer(name, weight * places, weight + outputs, not found, conv))
    return found


def flops(config: ModelConfig) -> int:
    """Floating-point operations of a training step, for one image."""
    return sum(2 * layer.macs * (2 if layer.first else 3) for layer in layers(config))


@dataclass(frozen=True)
class Way:
    """How a step is shared.

    Attributes:
        processes: P.
        towers: T.
        scheme: towers, or weird (convolutions whole, each process half of the pair's images).
        batch: B.
        nodes: machines that the processes are spread over evenly; the two towers of a pair are never parted.
        overlap: travel is hidden where it can be.
        precision: of what crosses between towers: fp32 or bf16.
    """

    processes: int
    towers: int
    scheme: str
    batch: float
    nodes: int = 1
    overlap: bool = True
    precision: str = "fp32"

    @property
    def data_ranks(self) -> int:
        """D."""
        return self.processes // self.towers

    @property
    def pair_batch(self) -> float:
        """Images of a pair (or of a process alone), B/D."""
        return self.batch / self.data_ranks


@dataclass(frozen=True)
class Link:
    """A way between processes, the same in both directions at once.

    Attributes:
        bytes_per_s: of one process, when all of them use it.
        latency_s: of a message.
        busy: share of the travel for which the processor can do nothing else: 1 where it carries the bytes itself.
    """

    bytes_per_s: float
    latency_s: float
    busy: float

    def seconds(self, size: float) -> float:
        """How long so many bytes travel."""
        return size / self.bytes_per_s + self.latency_s


@dataclass(frozen=True)
class Machine:
    """A node of those that processes run on.

    Attributes:
        flop_s: floating-point operations a second that a process gets out of the layers, with all that is no product in the time.
        update_bytes_s: memory traffic a second during the update.
        floor_s: forward and backward take at least so long: launching kernels, one after the other.
        processors: processors; more processes than that take turns.
        pair: link between the two towers.
        inside: link of a processor for sums inside a node.
        between: link of a processor to other nodes, when all of the node use theirs.
        loader_img_s: images a second that its loader gives; inf: it is not what is asked here.
    """

    flop_s: float
    update_bytes_s: float
    floor_s: float
    processors: int
    pair: Link
    inside: Link
    between: Link
    loader_img_s: float = math.inf

    def all_reduce(self, ranks: int, nodes: int) -> Link:
        """What a sum over so many processes, evenly on so many nodes, has of a link: rings for the bytes, which leave a node by
        the links of all its members at once; trees for the latency."""
        members = ranks // nodes
        latency = 2 * (_levels(members) * self.inside.latency_s + _levels(nodes) * self.between.latency_s)
        if nodes == 1:
            return replace(self.inside, latency_s=latency)
        return Link(min(self.inside.bytes_per_s, members * self.between.bytes_per_s), latency, self.between.busy)


def _levels(count: int) -> int:
    """Of a tree of so many."""
    return math.ceil(math.log2(count))


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by part; bytes that each process sends.

    Attributes:
        compute_s: forward, backward and update.
        exchange_s: exposed exchange of activations.
        gradients_s: exposed sums of gradients.
        loader_s: what the loader takes for the batch.
        exchange_bytes, gradient_bytes: sent by a process.
    """

    compute_s: float
    exchange_s: float
    gradients_s: float
    loader_s: float
    exchange_bytes: float
    gradient_bytes: float

    @property
    def network_s(self) -> float:
        """All but the loader."""
        return self.compute_s + self.exchange_s + self.gradients_s

    @property
    def seconds(self) -> float:
        """The step."""
        return max(self.network_s, self.loader_s)

    @property
    def exposed(self) -> float:
        """Share of the network's time that is exposed communication."""
        return (self.exchange_s + self.gradients_s) / self.network_s


def _halved(way: Way, layer: Layer) -> bool:
    """Whether a process holds half of the layer's parameters (and takes all of the pair's images through it)."""
    return way.towers == 2 and not (way.scheme == "weird" and layer.conv)


def _exposed(link: Link, travel: float, window: float, overlap: bool) -> float:
    """Exposed seconds of a travel that may hide behind a window of arithmetic."""
    return link.busy * travel + max(0.0, (1 - link.busy) * travel - (window if overlap else 0.0))


def _exchange(config: ModelConfig, way: Way, machine: Machine, product: dict[str, float]) -> tuple[float, float]:
    """Exposed seconds of the activations' exchange, and bytes that a process sends. `product`: seconds of a layer, forward."""
    if way.towers == 1:
        return 0.0, 0.0
    seconds = sent = 0.0
    for (name, direction), image in computed(config, way.scheme, way.precision).crossings.items():
        size, own = image * way.pair_batch, product.get(name, 0.0)  # logits: no product
        # Forward: own half of the product. Backward, once the half that is sent is computed: the weights, and own half.
        window = own * (0.5 if direction == "forward" else 1.5)
        seconds += _exposed(machine.pair, machine.pair.seconds(size), window, way.overlap)
        sent += size
    return seconds, sent


def _gradients(table: list[Layer], way: Way, machine: Machine, product: dict[str, float]) -> tuple[float, float]:
    """Exposed seconds of the gradients' sums, and bytes that a process sends."""
    done = free = busy = sent = 0.0  # backward so far; when the link is free again; what the processor carried; bytes
    for layer in reversed(table):
        done += product[layer.name] * (1 if layer.first else 2)
        halved = _halved(way, layer)
        ranks = way.data_ranks if halved else way.processes
        if ranks > 1:
            size = 2 * (ranks - 1) / ranks * GRADIENT_BYTES * layer.parameters / (2 if halved else 1)
            link = machine.all_reduce(ranks, way.nodes)
            travel = link.seconds(size)
            busy, sent = busy + link.busy * travel, sent + size
            free = max(free, done) + (1 - link.busy) * travel if way.overlap else free + (1 - link.busy) * travel
    return busy + (max(0.0, free - done) if way.overlap else free), sent


def predict(config: ModelConfig, way: Way, machine: Machine) -> Step:
    """The step of a network shared in this way on such machines."""
    table = layers(config)
    turns = max(1.0, way.processes / (machine.processors * way.nodes))
    share = way.pair_batch / way.towers  # of the arithmetic: half of each layer, or half of the images
    product = {layer.name: 2 * layer.macs * share / machine.flop_s for layer in table}
    arithmetic = sum(product[layer.name] * (2 if layer.first else 3) for layer in table)
    slower = max(1.0, machine.floor_s / arithmetic)
    product = {name: seconds * slower for name, seconds in product.items()}

    exchange_s, exchange_bytes = _exchange(config, way, machine, product)
    gradients_s, gradient_bytes = _gradients(table, way, machine, product)
    held = sum(layer.parameters / (2 if _halved(way, layer) else 1) for layer in table)
    update = UPDATE_PASSES * 4 * held / machine.update_bytes_s
    return Step(turns * (arithmetic * slower + update), turns * exchange_s, turns * gradients_s,
                way.batch / (machine.loader_img_s * way.nodes), exchange_bytes, gradient_bytes)
