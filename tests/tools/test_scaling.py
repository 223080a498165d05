"""The model of a training step, by hand, and the projections of docs/scaling.md."""
from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.alexnet import paper, parameter_count
from tools import scaling
from tools.scaling import (FIXED, H200, NODE, SCHEMES, UPDATE_PASSES, WEAK, Link, Machine, knees, layers, predict, project,
                           traffic)

ROOT = Path(__file__).resolve().parents[2]
SLOW, FREE = Link(1e9, 1e-3), Link(math.inf, 0.0)
PLAIN = Machine(flop_s=1e12, update_bytes_s=1e10, launch_s=0.0, pair=FREE, inside=FREE, between=FREE)
FLOP = 4.136e9  # of an image: twice 724.4 million multiply-adds forward, twice as many backward, but for conv1's input
VARIANTS = {  # of docs/scaling.md, "What this depends on"
    "as assumed": H200,
    "layers at half the speed": replace(H200, flop_s=H200.flop_s / 2),
    "layers at twice the speed": replace(H200, flop_s=H200.flop_s * 2),
    "launches in 0.2 ms (a CUDA graph)": replace(H200, launch_s=2e-4),
    "one card of 400 Gb/s a node, not eight": replace(H200, between=Link(45e9 / NODE, 10e-6)),
    "30 µs a level between nodes": replace(H200, between=Link(45e9, 30e-6))}
UPDATE_S = UPDATE_PASSES * 4 * 60_965_224 / 1e10


def test_layers_are_the_papers() -> None:
    assert sum(2 * layer.macs * (1 + layer.backward) for layer in layers(paper())) == pytest.approx(FLOP, rel=1e-4)
    assert sum(layer.macs for layer in layers(paper())) == pytest.approx(724.4e6, rel=1e-4)
    assert sum(layer.parameters for layer in layers(paper())) == parameter_count(paper()) == 60_965_224


def test_one_process_by_hand() -> None:
    step = predict(paper(), PLAIN, "one", 1, 100)
    assert step.compute_s == pytest.approx(100 * FLOP / 1e12 + UPDATE_S, rel=1e-4) and step.exposed_s == 0
    launched = predict(paper(), replace(PLAIN, launch_s=0.5), "one", 1, 1)
    assert launched.compute_s == pytest.approx(0.5 + UPDATE_S)


def test_ideal_links_share_the_work() -> None:
    convs = sum(layer.parameters for layer in layers(paper()) if layer.name.startswith("conv")) / 60_965_224
    for scheme, held in (("towers", 0.5), ("data", 1), ("weird", (1 + convs) / 2)):
        step = predict(paper(), PLAIN, scheme, 2, 100)
        assert step.compute_s == pytest.approx(100 * FLOP / 1e12 / 2 + UPDATE_S * held, rel=1e-4) and step.exposed_s == 0


def test_activations_hide_behind_own_half() -> None:
    size = 64 * sum(traffic(paper(), "towers").crossings.values())
    logits = 1e-3 + 64 * 1000 / 1e9  # never hidden
    slow = replace(PLAIN, pair=SLOW)
    # Four layers both ways, and the logits; nothing hides where computing takes no time.
    assert predict(paper(), replace(slow, flop_s=1e30), "towers", 2, 64).exposed_s == pytest.approx(size / 1e9 + 9 * 1e-3)
    assert logits < predict(paper(), slow, "towers", 2, 64).exposed_s < size / 1e9 + 9 * 1e-3
    assert predict(paper(), replace(slow, flop_s=1e9), "towers", 2, 64).exposed_s == pytest.approx(logits)


def test_gradients_hide_behind_the_rest_of_the_backward_pass() -> None:
    machine = replace(PLAIN, inside=Link(1e9, 0.0))
    whole, last = 4 * 60_965_224 / 1e9, 4 * 34_944 / 1e9  # all; conv1's, which is complete last
    assert predict(paper(), replace(machine, flop_s=1e30), "data", 2, 64).exposed_s == pytest.approx(whole)
    assert predict(paper(), replace(machine, flop_s=1e9), "data", 2, 64).exposed_s == pytest.approx(last)
    assert last < predict(paper(), machine, "data", 2, 64).exposed_s < whole


def test_all_reduces_between_nodes() -> None:
    machine = replace(PLAIN, inside=Link(100.0, 1.0), between=Link(10.0, 5.0))
    assert machine.all_reduce(8, 1) == Link(100.0, 2 * 3.0)
    assert machine.all_reduce(16, 2) == Link(80.0, 2 * (3 + 5.0))  # eight cards
    assert machine.all_reduce(8, 2) == Link(40.0, 2 * (2 + 5.0))  # one tower's four of each node
    assert machine.all_reduce(512, 16).bytes_per_s == 100.0  # no more than inside


def test_projections_are_those_of_docs_scaling() -> None:
    """Every speed of its tables for ImageNet-1k, the knees, what they depend on, and the tables of the command."""
    docs = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    printed = "\n".join(scaling.tables())
    parts = [(batch, False) for batch in FIXED[:2]] + [(WEAK, True)]
    speeds = [{(step.gpus, step.scheme): step for step in project(paper(), H200, *part)} for part in parts]
    for gpus in scaling.GPUS:
        for scheme in ("towers", "data") if gpus > 1 else ("one",):
            cells = re.search(rf"^\| {gpus:,} \| {'' if gpus == 1 else scheme + ' '}\| (.*) \|$", docs, re.MULTILINE)
            assert cells
            for cell, steps in zip(cells[1].split(" | "), speeds):  # 128 images cannot be shared by 1,024
                speed = f"{steps[gpus, scheme].images_per_s:,.0f}" if (gpus, scheme) in steps else "–"
                assert cell.split(", ")[0] == speed and (speed == "–" or speed in printed)
    for name, part in (("128, the paper's", parts[0]), ("4,096", parts[1]), ("32,768", (FIXED[2], False))):
        assert f"| {name} | {' / '.join(str(knees(paper(), H200, *part)[scheme]) for scheme in SCHEMES)} |" in docs
    for name, machine in VARIANTS.items():
        knee = ", ".join(str(count) for count in knees(paper(), machine, *parts[1]).values())
        weak = ", ".join(f"{step.efficiency:.0%}" for step in project(paper(), machine, WEAK, True, [1024]))
        assert f"| {name} | {knee} | {weak} |" in docs
    assert printed.startswith("Computed, not measured. Assumed:") and "NVLink" in printed and "400 Gb/s" in printed


def test_help_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "tools/scaling.py", "--project", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "computed from assumed speeds" in done.stdout and "torch" not in done.stderr
