"""tools/exchange_bytes.py: what it computes is what really crosses, and what it says about schemes."""
from dataclasses import replace
import json

import pytest

from tests.helpers.networks import small

from model.alexnet import paper
from tools import exchange_bytes
from tools.exchange_bytes import BYTES, SCHEMES, Traffic, check, computed, measured

SMALL = small()
Found = dict[tuple[str, str], list[Traffic]]


@pytest.fixture(scope="module")
def counted() -> Found:
    """The small network in two processes, every scheme and precision."""
    return measured(SMALL, [(scheme, precision) for scheme in SCHEMES for precision in BYTES])


@pytest.mark.parametrize("precision", BYTES)
def test_computed_is_measured(counted: Found, precision: str) -> None:
    check(SMALL, precision, counted)
    assert counted["towers", precision][0].image > counted["weird", precision][0].image > 0
    assert counted["data", precision][0].gradients > counted["weird", precision][0].gradients > 0
    assert counted["towers", precision][0].gradients == counted["data", precision][0].image == 0
    # 7 classes: 4 logits of tower a, 3 of tower b.
    assert [half.crossings["logits", "forward"] for half in counted["weird", precision]] == [
        4 * BYTES[precision], 3 * BYTES[precision]]


def test_other_bytes_are_an_error(counted: Found) -> None:
    with pytest.raises(RuntimeError, match=r"measured bytes of scheme towers in process 0 \(=.*\) must be those computed"):
        check(replace(SMALL, classes=9), "fp32", counted)


def test_the_papers_network() -> None:
    towers, weird, data = (computed(paper(), scheme, "fp32") for scheme in SCHEMES)
    both = {"conv3": 128 * 13 * 13 * 4, "fc6": 128 * 6 * 6 * 4, "fc7": 2048 * 4, "fc8": 2048 * 4}
    assert towers.crossings == {(name, way): size for name, size in both.items() for way in ("forward", "backward")} | {
        ("logits", "forward"): 500 * 4}
    assert weird.crossings == {key: size for key, size in towers.crossings.items() if key[0] != "conv3"}
    assert (towers.gradients, data.crossings, data.gradients) == (0, {}, 60_965_224 * 4)
    assert towers.step(10) == 10 * towers.image == 2_446_880
    # Where two schemes send as much, one image more makes the one that sends more an image the worse.
    even = towers.same_at(data)
    assert towers.step(int(even)) < data.step(int(even)) and towers.step(int(even) + 1) > data.step(int(even) + 1)
    assert data.same_at(data) == float("inf")


def test_many_pairs() -> None:
    towers, data = (computed(paper(), scheme, "bf16", pairs=4) for scheme in ("towers", "data"))
    assert towers.gradients == pytest.approx(2 * 3 / 4 * 60_965_224 / 2 * 4)
    assert data.gradients == pytest.approx(2 * 7 / 8 * 60_965_224 * 4)
    assert towers.same_at(data) == pytest.approx(computed(paper(), "towers", "bf16").same_at(computed(paper(), "data", "bf16")))


def test_json_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert exchange_bytes.main(["--json", "--precision", "bf16", "--batch", "256"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schemes"]["towers"]["bytes_per_step"] == 256 * 122_344 and not said["measured"]
    assert exchange_bytes.main([]) == 0
    said = capsys.readouterr().out
    assert "86,528" in said and "towers sends less than data below 997 images per pair" in said


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exchange_bytes.main(["--batch", "0"]) == 2
    assert "error: --batch (=0) must be at least 1; give a positive number" in capsys.readouterr().err
