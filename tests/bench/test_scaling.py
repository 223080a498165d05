"""The model of a step by hand, its bytes against those that are counted, its calibration from what a known machine gives."""
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.alexnet import paper, parameter_count
from tests.helpers.recipes import write_recipe
from tools import scaling, scaling_gpus
from tools.bench import parallel as bench_parallel, teams as bench_teams
from tools.bench.teams import LINK_BYTES, LinkTimes, Sharing, Turn
from tools.exchange_bytes import SCHEMES, computed
from tools.scaling_model import UPDATE_PASSES, Link, Machine, Way, flops, layers, predict
from train.config import Config

SLOW, FREE = Link(1e9, 1e-3, 0.0), Link(math.inf, 0.0, 0.0)
PLAIN = Machine(flop_s=1e12, update_bytes_s=1e10, floor_s=0.0, processors=2, pair=FREE, inside=FREE, between=FREE)
UPDATE_S = UPDATE_PASSES * 4 * 60_965_224 / 1e10


def test_layers_are_the_papers() -> None:
    assert flops(paper()) == pytest.approx(4.136e9, rel=1e-4)
    assert sum(layer.macs for layer in layers(paper())) == pytest.approx(724.4e6, rel=1e-4)
    assert sum(layer.parameters for layer in layers(paper())) == parameter_count(paper()) == 60_965_224


def test_one_process_by_hand() -> None:
    step = predict(paper(), Way(1, 1, "towers", 100), PLAIN)
    assert step.compute_s == pytest.approx(100 * flops(paper()) / 1e12 + UPDATE_S)
    assert (step.exchange_s, step.gradients_s, step.exchange_bytes, step.gradient_bytes) == (0, 0, 0, 0)
    launched = predict(paper(), Way(1, 1, "towers", 1), replace(PLAIN, floor_s=0.5))
    assert launched.compute_s == pytest.approx(0.5 + UPDATE_S)


def test_ideal_links_share_the_work_and_processors_are_shared_in_turns() -> None:
    arithmetic = 100 * flops(paper()) / 1e12
    towers, data, weird, four = (predict(paper(), Way(*way, 100), PLAIN) for way in (
        (2, 2, "towers"), (2, 1, "towers"), (2, 2, "weird"), (4, 2, "towers")))
    assert towers.seconds == pytest.approx((arithmetic + UPDATE_S) / 2)
    assert data.seconds == pytest.approx(arithmetic / 2 + UPDATE_S)
    convs = sum(layer.parameters for layer in layers(paper()) if layer.conv) / 60_965_224
    assert weird.seconds == pytest.approx(arithmetic / 2 + UPDATE_S * (1 + convs) / 2)
    assert four.seconds == pytest.approx(arithmetic / 2 + UPDATE_S)  # four on two: twice a quarter of the arithmetic, twice half


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pairs", [1, 2, 32])
def test_bytes_are_those_that_are_counted(scheme: str, precision: str, pairs: int) -> None:
    way = Way(2 * pairs, 1 if scheme == "data" else 2, scheme, 64 * pairs * 2, precision=precision)
    step, counted = predict(paper(), way, PLAIN), computed(paper(), scheme, precision, pairs)
    assert step.exchange_bytes == counted.image * way.pair_batch
    assert step.gradient_bytes == pytest.approx(counted.gradients, abs=10)  # rounded tensor by tensor there


def test_activations_hide_behind_own_half_unless_the_processor_carries_them() -> None:
    way = Way(2, 2, "towers", 64)
    size = computed(paper(), "towers", "fp32").image * 64
    plain = predict(paper(), replace(way, overlap=False), replace(PLAIN, pair=SLOW)).exchange_s
    assert plain == pytest.approx(size / 1e9 + 9 * 1e-3)  # four layers both ways, and the logits
    hidden = predict(paper(), way, replace(PLAIN, pair=SLOW)).exchange_s
    assert 1e-3 + 64 * 2000 / 1e9 < hidden < plain  # logits are never hidden
    carried = replace(PLAIN, pair=replace(SLOW, busy=1.0))
    assert predict(paper(), way, carried).exchange_s == pytest.approx(plain)
    assert predict(paper(), way, replace(PLAIN, flop_s=1e9, pair=SLOW)).exchange_s == pytest.approx(1e-3 + 64 * 2000 / 1e9)


def test_gradients_hide_behind_the_rest_of_the_backward_pass() -> None:
    way, machine = Way(2, 1, "towers", 64), replace(PLAIN, inside=Link(1e9, 0.0, 0.0))
    alone = predict(paper(), replace(way, overlap=False), machine).gradients_s
    assert alone == pytest.approx(4 * 60_965_224 / 1e9)
    slow_network = predict(paper(), way, replace(machine, flop_s=1e9)).gradients_s
    assert slow_network == pytest.approx(4 * 34_944 / 1e9)  # conv1's, complete last
    assert slow_network < predict(paper(), way, machine).gradients_s < alone
    carried = replace(machine, flop_s=1e9, inside=Link(1e9, 0.0, 1.0))
    assert predict(paper(), way, carried).gradients_s == pytest.approx(alone)


def test_sums_between_nodes() -> None:
    machine = Machine(1e12, 1e10, 0.0, 8, FREE, inside=Link(100.0, 1.0, 0.0), between=Link(10.0, 5.0, 0.0))
    assert machine.all_reduce(8, 1) == Link(100.0, 2 * 3.0, 0.0)
    assert machine.all_reduce(16, 2) == Link(80.0, 2 * (3 + 5.0), 0.0)   # eight cards
    assert machine.all_reduce(8, 2) == Link(40.0, 2 * (2 + 5.0), 0.0)    # one tower's four of each node
    assert machine.all_reduce(512, 16).bytes_per_s == 100.0              # no more than inside


def test_the_slower_of_network_and_loader_counts() -> None:
    way = Way(16, 2, "towers", 1600, nodes=2)
    step = predict(paper(), way, replace(PLAIN, processors=8, loader_img_s=100.0))
    assert step.loader_s == pytest.approx(8.0) and step.seconds == step.loader_s > step.network_s


# --- calibration

TRUTH = {busy: Machine(speed, update_bytes_s=7e9, floor_s=0.0, processors=2, pair=Link(1.5e9, 2e-4, 1.0),
                       inside=Link(1.2e9, 3e-4, 1.0), between=Link(1.2e9, 3e-4, 1.0))
         for busy, speed in ((False, 2e11), (True, 1.5e11))}


class KnownTeam:
    """A team whose steps take what the model says of TRUTH."""

    def __init__(self, sharing: Sharing, config: Config, loader: bool = False) -> None:
        self.sharing, self.config = sharing, config

    def turn(self, steps: int, *, overlap: bool = True, batch: int = 0, warm: int = 1) -> list[Turn]:
        batch = batch or self.config.train.batch
        if self.sharing.apart:
            way = Way(1, 1, "towers", batch / 2)
        else:
            way = replace(scaling.way_of(bench_parallel.Side(self.sharing, overlap), self.config), batch=batch)
        seconds = steps * predict(self.config.model, way, TRUTH[self.sharing.processes > 1]).seconds
        return [Turn(steps, seconds, dict.fromkeys(bench_teams.WAITS, 0.0), seconds, 0.0)] * self.sharing.processes

    def link(self) -> list[LinkTimes]:
        machine = TRUTH[True]
        sums = machine.all_reduce(2, 1)
        return [LinkTimes(tuple(machine.pair.seconds(size) for size in LINK_BYTES),
                          tuple(sums.seconds(size) for size in LINK_BYTES))] * 2

    def close(self) -> None:
        pass


def test_calibration_finds_a_known_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_teams, "Team", KnownTeam)
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda pid: {0, 1})
    recipe = write_recipe(tmp_path)
    words = ["--measure", "--config", str(recipe), "--batch", "64", "--rounds", "2", "--seconds", "0.01"]
    assert scaling.main([*words, "--json", str(tmp_path / "found.json")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["checked"]) == 9
    for one in found["checked"]:  # the message of 4 bytes counts as none: 3 ns of 200 µs
        assert one["predicted_s"] == pytest.approx(one["measured_s"], rel=1e-3), one["name"]
    assert found["machines"]["several"]["flop_s"] == pytest.approx(1.5e11)
    assert "within 20%" in capsys.readouterr().out

    monkeypatch.setitem(TRUTH, True, replace(TRUTH[True], processors=1))  # what the calibration cannot know
    assert scaling.main(words) == 1
    assert "not within 20%" in capsys.readouterr().out


# --- GPUs that are not here

def test_projections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "p.json"
    assert scaling.main(["--project", "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "Assumed" in said and all(text in str(found["assumed"]) for text in ("25%", "NVLink", "400 Gb/s"))
    assert len(found["projections"]) == 2 * 4
    for part in found["projections"]:
        one, *more = part["ways"]
        assert one["scheme"] == "one" and one["efficiency"] == 1.0 and one["exposed"] == 0.0
        assert one["epoch_s"] == pytest.approx(part["images"] / one["images_per_s"])
        for row in more:
            assert row["batch"] == (part["batch"] * row["gpus"] if part["weak"] else part["batch"])
            assert all(row["fed_images_per_s"][tier] <= row["images_per_s"] * (1 + 1e-9) for tier in scaling_gpus.TIERS)
            assert row["node_images_per_s"] == pytest.approx(row["images_per_s"] / math.ceil(row["gpus"] / 8))
    fixed, weak = found["projections"][0], found["projections"][3]
    assert {row["gpus"] for row in fixed["ways"]} == {1, 2, 8, 64}  # 128 images cannot be shared by 1024
    assert {row["gpus"] for row in weak["ways"]} == set(scaling_gpus.GPUS)
    assert fixed["knee"]["towers"] < weak["knee"]["towers"]
    rows = {row["variant"]: row for row in found["sensitivity"]}
    usual = rows.pop("as assumed")
    assert all(row != usual for row in rows.values()) and len(rows) == 5  # each assumption matters


def test_what_was_not_asked_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (([], "--measure or --project"), (["--project", "--machine.precision=bf16"], "--machine.precision")):
        with pytest.raises(SystemExit) as ended:
            scaling.main(words)
        assert ended.value.code == 2 and message in capsys.readouterr().err


# --- tools/bench/parallel.py

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
    assert bench_parallel.main(small(tmp_path, *words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_towers_beside_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.json"
    code = bench_parallel.main(small(tmp_path, "--ways", "towers,half", "--json", str(out)))
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
    from train.recipe import load
    return 8 * computed(load(write_recipe(tmp_path)).model, "towers", "fp32").image


def test_a_process_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_parallel.main(small(tmp_path, "--ways", "one", "--loader")) == 2
    assert "process 0 of team one failed" in capsys.readouterr().err  # the recipe's index is nowhere
