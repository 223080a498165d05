"""The model of a step with GPUs put in that are not here: H200s, 8 in a node, 400 Gb/s each. Their figures are assumed (ASSUMED).

The one concept: a projection is a scheme on so many GPUs, with a batch for all (fixed) or for each (weak scaling).
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tools.scaling_model import Link, Machine, Step, Way, predict

if TYPE_CHECKING:
    from model.config import ModelConfig

GPUS = (1, 2, 8, 64, 1024)
NODE = 8  # GPUs
CORES = 112  # of a node, for its loaders
SCHEMES = ("towers", "data", "weird")
FIXED, WEAK = (128, 4096, 32768), 256  # images of a step; of a step, for each GPU
KNEE = 0.8  # of the ideal speed
SETS = {"ImageNet-1k": (1_281_167, 1000), "Fall 2011": (14_197_122, 21_841)}  # images, classes
# By tier: bytes of an image; CPU ms to make it ready, measured on two cores of an EPYC (docs/results/2026-11-22-loader.md).
TIERS = {"archives": (110_000, 1.44), "packed": (25_800, 0.50), "resident": (196_608, 0.14)}
PEAK, SHARE = 989e12, 0.25  # dense bf16 FLOP/s of an H200; of which the layers get so much
ASSUMED = {
    "layers": f"{SHARE:.0%} of an H200's dense bf16 peak ({PEAK / 1e12:.0f} TFLOP/s), with all that is no product in the time",
    "launches": "forward and backward take at least 1 ms (some 200 kernels, launched one after the other)",
    "update": "4.3 TB/s of the memory's 4.8",
    "inside a node": "NVLink at 360 of its 450 GB/s each way; 10 µs a message, 3 µs a level of a sum",
    "between nodes": "a card of 400 Gb/s for each GPU at 45 of its 50 GB/s each way, 10 µs a level",
    "loader": f"{CORES} cores a node as fast as those measured here",
}


def h200() -> Machine:
    """A node of H200s, as ASSUMED; its loader is not."""
    return Machine(flop_s=SHARE * PEAK, update_bytes_s=4.3e12, floor_s=1e-3, processors=NODE, pair=Link(360e9, 10e-6, 0.0),
                   inside=Link(360e9, 3e-6, 0.0), between=Link(45e9, 10e-6, 0.0))


def variants() -> dict[str, Machine]:
    """h200() with other assumptions: what the conclusions depend on."""
    base = h200()
    return {"as assumed": base,
            "layers at half the speed": replace(base, flop_s=base.flop_s / 2),
            "layers at twice the speed": replace(base, flop_s=base.flop_s * 2),
            "launches in 0.2 ms (a CUDA graph)": replace(base, floor_s=2e-4),
            "one card of 400 Gb/s a node": replace(base, between=replace(base.between, bytes_per_s=45e9 / NODE)),
            "levels of 30 µs between nodes": replace(base, between=replace(base.between, latency_s=30e-6))}


@dataclass(frozen=True)
class Projected:
    """So many GPUs sharing a step in one scheme.

    Attributes:
        ideal: images a second of as many GPUs that had nothing to say to each other, in one GPU's steps.
    """

    scheme: str
    gpus: int
    batch: int
    step: Step
    ideal: float

    @property
    def images_per_s(self) -> float:
        """Of all of them, with a loader that is never waited for."""
        return self.batch / self.step.network_s

    @property
    def efficiency(self) -> float:
        """Share of the ideal speed. Above 1 where a step of the pair is larger than one GPU's, and its update half."""
        return self.images_per_s / self.ideal

    @property
    def nodes(self) -> int:
        """As many as they need."""
        return -(-self.gpus // NODE)

    def fed(self, tier: str) -> float:
        """Images a second of all of them when the node's loader has no more than CORES."""
        loader = self.nodes * CORES / (TIERS[tier][1] / 1e3)
        return self.batch / replace(self.step, loader_s=self.batch / loader).seconds

    def as_json(self, images: int) -> dict[str, Any]:
        """Everything, for a set of so many images; what a node's loader must read and compute, by tier."""
        node = self.images_per_s / self.nodes
        return {"scheme": self.scheme, "gpus": self.gpus, "batch": self.batch, "step_ms": 1e3 * self.step.network_s,
                "images_per_s": self.images_per_s, "epoch_s": images / self.images_per_s, "exposed": self.step.exposed,
                "efficiency": self.efficiency, "node_images_per_s": node,
                "node_needs": {tier: {"mb_per_s": node * size / 1e6, "cores": node * ms / 1e3}
                               for tier, (size, ms) in TIERS.items()},
                "fed_images_per_s": {tier: self.fed(tier) for tier in TIERS}}


def project(model: ModelConfig, machine: Machine, batch: int, weak: bool, gpus: Sequence[int] = GPUS) -> list[Projected]:
    """Each scheme on so many GPUs, where they divide the batch: that of all, or (weak) of each."""
    one = batch / predict(model, Way(1, 1, "towers", batch, precision="bf16"), machine).network_s
    found = []
    for count in gpus:
        whole = batch * count if weak else batch
        for scheme in ("one",) if count == 1 else SCHEMES:
            if whole % count == 0:
                way = Way(count, 1 if scheme in ("one", "data") else 2, "weird" if scheme == "weird" else "towers", whole,
                          nodes=max(1, count // NODE), precision="bf16")
                found.append(Projected(scheme, count, whole, predict(model, way, machine), one * count))
    return found


def knee(model: ModelConfig, machine: Machine, scheme: str, batch: int, weak: bool) -> int:
    """Most GPUs (a power of two, up to 4096) whose efficiency is at least KNEE."""
    counts = [2 ** power for power in range(1, 13)]
    return max([1, *(one.gpus for one in project(model, machine, batch, weak, counts)
                     if one.scheme == scheme and one.efficiency >= KNEE)])


def projections() -> list[dict[str, Any]]:
    """All sets, fixed batches and weak scaling."""
    from model.alexnet import paper
    found = []
    for name, (images, classes) in SETS.items():
        model = replace(paper(), classes=classes)
        for batch, weak in (*((batch, False) for batch in FIXED), (WEAK, True)):
            found.append({"set": name, "images": images, "classes": classes, "batch": batch, "weak": weak,
                          "knee": {scheme: knee(model, h200(), scheme, batch, weak) for scheme in SCHEMES},
                          "ways": [one.as_json(images) for one in project(model, h200(), batch, weak)]})
    return found


def sensitivity(fixed: int = FIXED[1], most: int = GPUS[-1]) -> list[dict[str, Any]]:
    """For each variant: the knee with a fixed batch, and the efficiency of the most GPUs in weak scaling; ImageNet-1k."""
    from model.alexnet import paper
    found = []
    for name, machine in variants().items():
        weak = {one.scheme: one.efficiency for one in project(paper(), machine, WEAK, True, (most,))}
        found.append({"variant": name, "knee": {scheme: knee(paper(), machine, scheme, fixed, False) for scheme in SCHEMES},
                      "efficiency": weak})
    return found


def show(found: Sequence[dict[str, Any]], sensitive: Sequence[dict[str, Any]]) -> None:
    """A table for each set and batch; one of what they depend on."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print("Assumed:", *(f"  {name}: {text}" for name, text in ASSUMED.items()), sep="\n", highlight=False)
    for part in found:
        steps = f"{part['batch']} images a GPU" if part["weak"] else f"{part['batch']} images a step"
        table = Table(title=f"{part['set']}: {part['images']:,} images, {part['classes']:,} classes; {steps}",
                      title_justify="left")
        for column in ("GPUs", "scheme", "step ms", "img/s", "epoch s", "exposed", "efficiency", "a node's", *TIERS):
            table.add_column(column, justify="left" if column == "scheme" else "right", no_wrap=True)
        for row in part["ways"]:
            table.add_row(str(row["gpus"]), row["scheme"], f"{row['step_ms']:.2f}", f"{row['images_per_s']:,.0f}",
                          f"{row['epoch_s']:,.3g}", f"{row['exposed']:.0%}", f"{row['efficiency']:.0%}",
                          f"{row['node_images_per_s']:,.0f}", *(f"{speed:,.0f}" for speed in row["fed_images_per_s"].values()))
        console.print(table)
        console.print(f"knee (most GPUs at {KNEE:.0%} of the ideal speed): "
                      + ", ".join(f"{scheme} {count}" for scheme, count in part["knee"].items()), highlight=False)
    console.print(f"archives, packed, resident: img/s when a node's loader has {CORES} cores and this tier.", highlight=False)

    table = Table(title=f"What it depends on (ImageNet-1k; {', '.join(SCHEMES)})", title_justify="left")
    for column in ("assumed", f"knee, {FIXED[1]} images a step", f"efficiency, {GPUS[-1]} GPUs, {WEAK} images each"):
        table.add_column(column, no_wrap=True)
    for row in sensitive:
        table.add_row(row["variant"], ", ".join(str(count) for count in row["knee"].values()),
                      ", ".join(f"{row['efficiency'][scheme]:.0%}" for scheme in SCHEMES))
    console.print(table)
