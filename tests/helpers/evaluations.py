"""Tests of networks for tests: a network that needs no training, the command in this process."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import EvalLoader
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.loaders import eval_loader
from tests.helpers.runs import inside
from train.evaluate.__main__ import main

PIXELS = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")


class Means(nn.Module):
    """Logits (B, 6) from the mean of each half of each channel: sees where a crop lies and whether it is flipped."""

    def __init__(self) -> None:
        super().__init__()
        self.was_training: set[bool] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 67, 67)
        self.was_training.add(self.training)
        return torch.cat([images[..., :20].mean((2, 3)), images[..., 40:].mean((2, 3))], 1) / 40


def val_loader(tiny_set: TinySet, batch: int = 7, kind: type[EvalLoader] = EvalLoader) -> EvalLoader:
    """The validation images of the set."""
    index = SampleIndex.load(tiny_set.index)
    loader = eval_loader("archives", index, "val", PIXELS, batch, Stats.for_index(index, 76), machine=LoaderConfig(threads=1))
    loader.__class__ = kind
    return loader


def evaluate(*argv: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of `python -m train.evaluate`."""
    return inside(main, [str(word) for word in argv], code)


def evaluate_json(*argv: object) -> dict[str, Any]:
    """What `python -m train.evaluate --json` prints."""
    values: dict[str, Any] = json.loads(evaluate(*argv, "--json")[0])
    return values
