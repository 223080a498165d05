"""Any number of processes, in any way of sharing the work, trains to the same losses: real processes, dropout and lighting on."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tools import same_losses


@pytest.fixture(scope="module")
def recipe(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_set.index)


def compare(recipe: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, float]:
    assert same_losses.main(["--config", str(recipe), "--steps", "12", "--json", *options]) == code, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    # Far more than the limits: a mask, a draw or a gradient that differed would show.
    assert found["steps"] == 12 and abs(found["first"] - found["last"]) > 1e-3
    apart: dict[str, float] = found["largest_relative_difference"]
    return apart


def test_in_float64(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit (1e-10) is the command's: towers, towers × data, weird × data, both ways of feeding, pieces."""
    ways = ["towers-accumulate", "towers-x-data-replicate", "weird-x-data"]
    apart = compare(recipe, capsys, "--precision", "fp64", "--ways", *ways)
    assert list(apart) == ways and max(apart.values()) < 1e-12


def test_in_float32(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = compare(recipe, capsys, "--ways", "towers-x-data")
    assert 0 < max(apart.values()) < 1e-5, "sums in another order round differently"


def test_other_losses_are_told(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(same_losses, "losses", lambda way, *others: [1.0, 2.0 if way.name == "one" else 2.001])
    assert same_losses.main(["--config", str(recipe), "--ways", "weird"]) == 2
    assert "losses of weird (=5.0e-04 away) must equal those of one process to 1e-05 in fp32" in capsys.readouterr().err


def test_a_run_that_fails_is_shown(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert same_losses.main(["--config", str(recipe), "--steps", "2", "--ways", "data", "--train.batch=1000"]) == 2
    assert "run one (exit code 2) did not get to step 2; it said:" in capsys.readouterr().err
