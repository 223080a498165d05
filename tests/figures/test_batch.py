"""The sheet of training crops shows what was drawn for them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import DataConfig, SampleIndex, Stats
from tests.conftest import TinySet
from tests.helpers.figures import show
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.runs import ROOT
from tools.show.batch import captions, restore
from train.figures.kernels import need_matplotlib


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_a_sheet_shows_the_crops_that_were_drawn(tiny_set: TinySet, mean: str) -> None:
    """The restored crops are the resized images cut where the captions say, within JPEG rounding."""
    data = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.0, mean=mean)
    index = SampleIndex.load(tiny_set.index)
    stats = Stats.for_index(index, 76)
    with train_loader("archives", index, "train", data, 8, 5, stats) as loader:
        batch = next(iter(loader))
        drawn = loader.planner.augmentation(batch.ids, batch.epochs)
    crops = restore(batch, drawn, data, stats)
    with eval_loader("archives", index, "train", data, 8, None, ids=batch.ids) as resized:
        pixels = np.concatenate([part.images.numpy() for part in resized])
    for row in range(len(batch.ids)):
        crop = pixels[row][drawn.top[row]:drawn.top[row] + 67, drawn.left[row]:drawn.left[row] + 67]
        crop = crop[:, ::-1] if drawn.mirror[row] else crop
        # region decode and whole decode round the resize differently by at most a grey level or two
        assert np.abs(crop.astype(int) - crops[row]).mean() < 0.5
    boxes = DataConfig.preset("imagenet", region="square", square_px=76, crop_px=67)
    with train_loader("archives", index, "train", boxes, 8, 5, stats) as loader, \
            train_loader("archives", index, "train", replace(boxes, output="uint8"), 8, 5, stats) as plain:
        assert np.array_equal(restore(next(iter(loader)), drawn, boxes, stats), next(iter(plain)).images.permute(0, 2, 3, 1))
    text = captions(index, batch, drawn, stats)[0]
    assert f"id {batch.ids[0]}, epoch 0" in text and f"at {drawn.top[0]}, {drawn.left[0]}" in text
    assert text.splitlines()[0] == index.classes[int(batch.labels[0])].words.split(",")[0]


def test_the_command_writes_a_png(tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("batch", "--config", ROOT / "train/recipes/demo.yaml", "--index", tiny_set.index, "--out", tmp_path / "a/s.png")
    assert show(*words, "--count", "9") == 0, capsys.readouterr().err
    with Image.open(tmp_path / "a/s.png") as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 1000
    own = ("batch", "small", "--data.index", tiny_set.index, "--out", tmp_path / "own.png")  # which has `model.classes: auto`
    assert show(*own, "--count", "2") == 0, capsys.readouterr().err
    assert show(*words, "--count", "0") == 2
    assert "--count (=0) must lie in 1..200; " in capsys.readouterr().err
    assert show(*words, "--count", "200") == 2
    assert f"--count (=200) must not exceed the {tiny_set.train} images of split train; lower it" in capsys.readouterr().err
    assert show(*words, "--step", "-1") == 2
    assert "--step (=-1) must be at least 0; " in capsys.readouterr().err


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"matplotlib is not installed.*; pip install matplotlib"):
        need_matplotlib()
