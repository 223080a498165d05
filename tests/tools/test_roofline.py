"""The limits of docs/performance.md: by hand, against the network itself, and as the page has them."""
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.alexnet import AlexNet, paper, parameter_count
from tools import roofline
from train.recipe import parse


RECIPE = Path(__file__).resolve().parents[2] / "train/recipes/demo.yaml"


def test_operations_are_those_of_torchs_counter() -> None:
    """Forward: of grouped convolutions' gradients torch 2.13 counts that of the weights without the groups."""
    config = parse(["--config", str(RECIPE)]).config.model
    layers, px = roofline.work(config), config.input_px
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        AlexNet(config, seed=0)(torch.zeros(1, 3, px, px), step=0)
    assert 2 * sum(layer.macs for layer in layers) == counter.get_total_flops()
    assert sum(layer.flop for layer in layers) == 2 * (3 * sum(layer.macs for layer in layers) - layers[0].macs)
    assert sum(layer.parameters for layer in layers) == parameter_count(config)


def test_bytes_of_a_layer_by_hand() -> None:
    conv2, fc7 = (next(layer for layer in roofline.work(paper()) if layer.name == name) for name in ("conv2", "fc7"))
    inputs, maps, pooled = 96 * 27 * 27, 256 * 27 * 27, 256 * 13 * 13
    products = 3 * (inputs + maps)  # forward; gradients of weights and of the input
    assert conv2.fused == 2 * (products + (maps + pooled) + (pooled + 2 * maps)) + 2 * pooled
    assert conv2.apart == 2 * (products + 2 * maps + 3 * maps + 2 * (maps + pooled)) + 2 * 8 * pooled
    bias, relu, lrn, pool = 2 * maps + maps, 2 * maps + 3 * maps, 2 * maps + 3 * maps, 2 * (maps + pooled)
    assert conv2.unfused == 2 * (products + bias + relu + lrn + pool) + 2 * 8 * pooled
    assert fc7.fused == fc7.apart == 2 * (3 * 8192 + 4096) and fc7.unfused == 2 * (3 * 8192 + 13 * 4096)
    assert conv2.weights == 26 * (256 * 48 * 25 + 256)


def test_a_limit_adds_its_parts() -> None:
    layers = roofline.work(paper())
    found = roofline.limit(layers, 256, roofline.Card("", 1e15, 1e12))
    assert found.arithmetic == pytest.approx(256 * 4.136e9 / 1e15, rel=1e-3)
    assert found.weights == pytest.approx(26 * 60_965_224 / 1e12)
    assert found.images_s == pytest.approx(256 / (found.arithmetic + found.weights + found.activations))
    assert roofline.limit(layers, 256, roofline.CARDS[0], fused=False).images_s < 80_000


def test_the_page_has_these_tables() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/performance.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in roofline.tables(paper()) if line not in page]
    assert not missing, "run python -m tools.roofline and put this into docs/performance.md:\n" + "\n".join(missing)
