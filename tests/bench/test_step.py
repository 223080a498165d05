"""The command that times a training step against plain PyTorch, and that both compute the same."""
import json
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


WORDS = ["--config", str(RECIPE), "--rounds", "1", "--seconds", "0.01", "--train.batch=4", "--machine.torch_threads=1",
         "--machine.device=cpu"]


@pytest.mark.parametrize("words, message", [
    (["--ways", "towers,tower"], r"--ways (=tower) must be among plain, plain-recipe, one, halves, towers"),
    (["--ways", "towers-x-data", "--train.batch=10"], "train.batch (=10) must be a multiple of 4"),
    (["--rounds", "0"], "--rounds (=0) must be at least 1"),
    (["--nonsense"], "nonsense")])
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert step.main([*WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_plain_one_process_and_two_towers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*WORDS, "--machine.channels_last=true", "--ways"]
    out = tmp_path / "b.json"
    assert step.main([*words, "plain,plain-recipe,one", "--json", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo, batch 4, on cpu; the recipe says fp32, channels_last true; n = 1")
    assert [line.split()[0] for line in lines[1:]] == ["plain", "plain-recipe", "one"]
    assert lines[1].endswith("× 1.00 (1.00–1.00)") and json.loads(out.read_text())["ways"][2]["images_per_s"]["median"] > 0
    assert step.main([*words, "one,towers", "--json"]) == 0
    assert [(way["name"], way["processes"], len(way["step_s"])) for way in json.loads(capsys.readouterr().out)["ways"]] == [
        ("one", 1, 1), ("towers", 2, 1)]


def test_a_process_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*WORDS, "--ways", "towers", "--model.towers=1"]) == 2
    assert "process 0 of way towers failed" in capsys.readouterr().err
