"""tools/bench/parallel.py: what it measures beside one process, and mistakes."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.recipes import write_recipe
from tools.bench import parallel
from tools.scaling import traffic
from train.recipe import load


def small(tmp_path: Path, *words: str) -> list[str]:
    return ["--config", str(write_recipe(tmp_path)), "--batch", "8", "--rounds", "1", "--seconds", "0.02", *words]


@pytest.mark.parametrize("words, message", [
    (["--ways", "towers,tower"], r"--ways (=tower) must be among one, apart"),
    (["--batch", "10"], "--batch (=10) must be a multiple of 4"),
    (["--rounds", "0"], "--rounds (=0) must be at least 1"),
    (["--machine.precision=fp64"], "machine.precision (=fp64)"),
    (["--nonsense"], "nonsense"),
])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert parallel.main(small(tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_towers_beside_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    code = parallel.main(small(tmp_path, "--ways", "towers,half", "--json", str(out)))
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(out.read_text())
    assert [way["name"] for way in found["ways"]] == ["one", "towers", "towers, no overlap", "half"]
    one, towers, plain, half = found["ways"]
    assert one["ratio"]["median"] == 1.0 and one["sent_bytes"] == {"activations": 0, "gradients": 0}
    # nothing to sum
    assert towers["sent_bytes"] == plain["sent_bytes"] == {"activations": computed_bytes(tmp_path), "gradients": 0}
    assert towers["waits"]["activations"] > 0 and towers["sent_bytes_per_s"] > 0
    assert half["waits"]["activations"] == half["sent_bytes"]["activations"] == 0
    assert "two towers over one process" in said.out and "one tower alone over that of both" in said.out


def computed_bytes(tmp_path: Path) -> int:
    return 8 * sum(traffic(load(write_recipe(tmp_path)).model, "towers", "fp32").crossings.values())


def test_a_process_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parallel.main(small(tmp_path, "--ways", "towers", "--model.towers=1")) == 2
    assert "process 0 of team towers failed" in capsys.readouterr().err
