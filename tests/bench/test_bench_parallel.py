"""tools/bench/parallel.py: what it measures beside one process, and mistakes."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.recipes import write_recipe
from tools.bench import parallel


def small(tmp_path: Path, *words: str) -> list[str]:
    return ["--config", str(write_recipe(tmp_path)), "--batch", "8", "--rounds", "1", "--seconds", "0.02", *words]


@pytest.mark.parametrize("words, message", [
    (["--ways", "towers,tower"], r"--ways (=tower) must be among one, towers"),
    (["--batch", "10"], "--batch (=10) must be a multiple of 4"),
    (["--rounds", "0"], "--rounds (=0) must be positive"),
    (["--machine.precision=fp64"], "machine.precision (=fp64)"),
    (["--nonsense"], "nonsense"),
])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert parallel.main(small(tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_towers_beside_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    code = parallel.main(small(tmp_path, "--ways", "towers", "--json", str(out)))
    said = capsys.readouterr()
    assert code == 0, said.err
    found: dict[str, Any] = json.loads(out.read_text())
    assert [(way["name"], way["processes"]) for way in found["ways"]] == [("one", 1), ("towers", 2), ("towers, no overlap", 2)]
    one, towers, plain = found["ways"]
    assert one["ratio"]["median"] == 1.0 and one["waits"]["activations"] == 0
    assert 0 < towers["waits"]["activations"] < 1 and plain["waits"]["activations"] > 0
    assert "towers, no overlap" in said.out and len(towers["cpu_s"]) == 1


def test_a_process_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parallel.main(small(tmp_path, "--ways", "towers", "--model.towers=1")) == 2
    assert "process 0 of team towers failed" in capsys.readouterr().err
