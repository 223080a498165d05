"""Shared data of the tests: a small ILSVRC2012-shaped set, synthetic, indexed by the real builder, with its statistics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import train  # noqa: F401 (before torch: it says how idle threads wait)
import torch

from tests.helpers.disks import mounted_disk

# Without a GPU the tests of model/kernels run in Triton's interpreter, on CPU tensors. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@dataclass(frozen=True)
class TinySet:
    """Archives (nested train tar, val tar out of name order, devkit) in `folder`, their index with stats of 76 px."""

    folder: Path
    index: Path
    classes: int
    train: int
    val: int


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with mounted_disk(tmp_path / "disk", "2m") as disk:
        yield disk


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> TinySet:
    """6 classes, 12 synthetic pictures each (80 to 100 px), and the odd files of tools/demo/dataset.py; 4 validation pictures a
    class. One odd file cannot be decoded: training replaces it, within the default budget."""
    from pipeline.index.sample_index import SampleIndex
    from pipeline.index.builder import Builder
    from pipeline.index.ilsvrc import build_ilsvrc
    from pipeline.compute_stats import compute
    from pipeline.stats import stats_path
    from tools.demo import dataset as make_demo

    folder = tmp_path_factory.mktemp("tiny_set")
    make_demo.make(folder, 0, 6, 12, 4, (80, 100))
    builder = Builder(folder / "index", "ilsvrc2012", jobs=1)
    build_ilsvrc(builder, train=folder / make_demo.TRAIN, val=folder / make_demo.VAL, test=None,
                 devkit=folder / make_demo.DEVKIT)
    index = SampleIndex.load(folder / "index")
    compute(index, "train", 76).save(stats_path(index.path, 76))
    return TinySet(folder, index.path, len(index.classes), len(index.ids("train")), len(index.ids("val")))
