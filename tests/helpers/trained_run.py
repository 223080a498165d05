"""A run folder with checkpoints of untrained networks, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.alexnet import AlexNet
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.recipes import write_recipe
from train import build
from train.checkpoint import checkpoint
from train.recipe import dump, load


def write_run(folder: Path, tiny_set: TinySet, errors: tuple[float | None, ...] = (0.5,), name: str = "run", seed: int = 0,
              **replaced: str) -> Path:
    """`folder`/`name` with one checkpoint for each validation error, of networks whose initial values differ."""
    index = SampleIndex.load(tiny_set.index)
    config = load(write_recipe(folder, tiny_set.index, **replaced))
    for step, error in enumerate(errors):
        network = AlexNet(config.model, seed=seed + step)
        with torch.no_grad():  # as they begin, all images would be about the same to them
            for parameter, value in network.named_parameters():
                value.mul_(0 if parameter.endswith("bias") else 4)
        tensors, shapes = build.parameters(network, config)

        def attach(path: Path) -> None:
            (path / checkpoint.CONFIG).write_text(dump(config), encoding="utf-8")
            Stats.for_index(index, config.data.square_px).save(path / checkpoint.STATS)

        state: dict[str, Any] = {"step": step, "validation_error": error, "classes": build.classes_sha256(index)}
        checkpoint.save(folder / name / "checkpoints", checkpoint.checkpoint_name(step, None), tensors, shapes, state, attach,
                        ALONE)
    return folder / name
