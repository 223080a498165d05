"""Any number of processes, in any way of sharing the work, trains to the same losses: real processes, dropout and lighting on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TinySet
from tests.helpers.losses import SHARINGS, SINGLE, largest_difference, losses
from tests.helpers.recipes import write_recipe


def differences(tiny_set: TinySet, folder: Path, names: list[str], steps: int, precision: str) -> dict[str, float]:
    recipe, setting = write_recipe(folder, tiny_set.index, epochs="  epochs: 30"), f"--machine.precision={precision}"
    single = losses(SINGLE, recipe, folder, steps, setting)
    assert abs(single[0] - single[-1]) > 1e-3, "far more than the limits: a mask, a crop or a gradient that differed would show"
    return {name: largest_difference(losses(SHARINGS[name], recipe, folder, steps, setting), single) for name in names}


def test_in_float64(tiny_set: TinySet, tmp_path: Path) -> None:
    """Weird × data in four processes; every way in the slow test."""
    found = differences(tiny_set, tmp_path, ["weird-x-data"], 12, "fp64")
    assert max(found.values()) < 1e-12, found


@pytest.mark.slow
def test_in_float32(tiny_set: TinySet, tmp_path: Path) -> None:
    found = differences(tiny_set, tmp_path, ["towers-x-data"], 12, "fp32")
    assert 0 < max(found.values()) < 1e-5, "sums in another order round differently"


@pytest.mark.slow
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-5), ("fp64", 1e-10)])
def test_every_way_for_200_steps(tiny_set: TinySet, tmp_path: Path, precision: str, limit: float) -> None:
    """Training amplifies the rounding of a step. (In float32 larger recipes differ by 1% after 200 steps, as one process in two
    pieces does: the last bit decides at a ReLU or a maximum. See docs/results/2026-11-22-parallel.md.)"""
    found = differences(tiny_set, tmp_path, list(SHARINGS), 200, precision)
    assert max(found.values()) < limit, found
