"""What needs no GPU of tools/bench/gpu.py: rates of turns, mistakes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import write_recipe
from tools.bench import gpu as bench_gpu


def test_a_rate_is_what_was_done_in_a_turns_time() -> None:
    def step() -> int:
        time.sleep(0.002)
        return 8
    rate = bench_gpu.rates(step, argparse.Namespace(seconds=0.05, repeats=2))
    assert 0 < rate.least <= rate.median <= 8 / 0.002


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, message in (
            (["--only", "copies", "decoder"], "--index (=none) must name an index with statistics, whose images the"),
            (["--repeats", "0"], "--repeats (=0) must be positive; leave it out"),
            (["--seconds", "-1"], "--seconds (=-1.0) must be positive; leave it out"),
            ([], "device (=cuda) is not there; run this on a machine with a GPU")):
        assert bench_gpu.main(["--config", str(write_recipe(tmp_path)), *words]) == 2
        assert f"error: {message}" in capsys.readouterr().err
