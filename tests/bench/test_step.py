"""The command that times a training step against plain PyTorch, and that both compute the same."""
from pathlib import Path

import pytest
import torch

from model.alexnet import AlexNet
from tests.helpers.networks import small
from tools.bench import step
from train.recipe import load

RECIPE = Path(__file__).resolve().parents[2] / "train" / "recipes" / "demo.yaml"


def test_the_plain_network_is_ours() -> None:
    import dataclasses

    config = dataclasses.replace(load(RECIPE), model=small(lrn=None))  # torch's LRN has no windows that end between towers
    plain, network = step.plain_network(config).eval(), AlexNet(config.model, seed=3).eval()
    with torch.no_grad():
        for theirs, ours in zip(plain.parameters(), network.parameters(), strict=True):
            theirs.copy_(ours)
        x = torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(plain(x), network(x))
    assert sum(isinstance(layer, torch.nn.LocalResponseNorm) for layer in step.plain_network(load(RECIPE))) == 2


def test_step_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--config", str(RECIPE), "--rounds", "1", "--seconds", "0.01", "--train.batch=2",
                      "--machine.channels_last=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo, batch 2, on cpu; the recipe says fp32, channels_last true; n = 1")
    assert [line.split("  ")[0] for line in lines[1:]] == [
        f"{who}, {how}" for how in ("PyTorch's defaults", "as the recipe says") for who in ("plain", "ours")]
    assert lines[1].endswith("× 1.00 (1.00–1.00)")
    assert step.main(["--rounds", "0"]) == 2 and "--rounds (=0) must be positive" in capsys.readouterr().err
