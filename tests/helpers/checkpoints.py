"""Small checkpoints of two tensors, written, read and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import torch

from train.checkpoint import checkpoint
from train.parallel.topology import Topology

ALONE = Topology.single()
SHAPES = {"weight.a": (5, 3), "velocity.a": (5, 3), "weight.b": (4,)}
STATE = {"validation_error": None}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def attach(folder: Path) -> None:
    (folder / checkpoint.CONFIG).write_text("a: 1\n", encoding="utf-8")
    (folder / checkpoint.STATS).write_bytes(b"123")


def disk_full(*given: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def save(root: Path, step: int, error: float | None = None, epochs: int | None = None,
         attach: Callable[[Path], None] = attach, **state: Any) -> Path:
    return checkpoint.save(root, checkpoint.checkpoint_name(step, epochs), tensors(step), SHAPES,
                           {"step": step, "validation_error": error, **state}, attach, ALONE)


def check(path: Path, seed: int) -> None:
    """The checkpoint is whole, and holds `tensors(seed)`."""
    checkpoint.verify(path)
    stored = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    checkpoint.load(path, stored, SHAPES, ALONE)
    for name, value in tensors(seed).items():
        assert torch.equal(stored[name], value), name
