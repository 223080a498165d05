"""tools/soak_loader.py: it sees what grows, and says so."""

from __future__ import annotations

import json

import pytest

from tests.conftest import TinySet
from tools import soak_loader
from tools.soak_loader import Holdings

OPTIONS = ["--square-px", "76", "--crop-px", "67", "--batch", "4", "--batches", "60", "--warm-up", "20"]


@pytest.mark.parametrize("tier", ["archives", "resident"])
def test_a_short_soak_finds_nothing(tiny_set: TinySet, tier: str, tmp_path_factory: pytest.TempPathFactory,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path_factory.mktemp("soak")
    options = [*OPTIONS, "--tier", tier, "--folder", str(folder), "--limit-mib", "64", "--json"]  # so short a run still warms up
    assert soak_loader.main([str(tiny_set.index), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tier"] == tier and found["handles"][0] == found["handles"][1] and len(found["marks"]) == 11


def test_growth_is_told(tiny_set: TinySet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, calls = soak_loader.holdings, []

    def growing() -> Holdings:
        calls.append(real())
        return Holdings(calls[-1].memory_kib, calls[-1].handles + len(calls), calls[-1].threads)

    monkeypatch.setattr(soak_loader, "holdings", growing)
    assert soak_loader.main([str(tiny_set.index), *OPTIONS]) == 2
    assert "must hold constant memory (within 4.0 MiB), handles and threads" in capsys.readouterr().err


def test_what_lasts_a_moment_is_no_leak() -> None:
    marks = [Holdings(10, 5, 24), Holdings(11, 6, 17), Holdings(12, 5, 17)]
    assert soak_loader.least(marks) == Holdings(10, 5, 17)


def test_mistakes_are_explained(tiny_set: TinySet, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak_loader.main([str(tiny_set.index), "--batches", "0"]) == 2
    assert "--batches (=0) must be at least 1" in capsys.readouterr().err
    assert soak_loader.main([str(tiny_set.index)]) == 2
    assert "stats-train-256.npz must exist" in capsys.readouterr().err
