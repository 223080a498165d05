"""The pixels of real photographs against the oracle. Give an index of full-size ones: PHOTOGRAPHS=DIR pytest -m slow."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.oracle import LARGEST_TOLERANCE, MEAN_TOLERANCE, PAPER, ten_views, training_crop

from pipeline.sampling.augment import lighting_shift
from pipeline.index.sample_index import SampleIndex
from pipeline.compute_stats import compute
from pipeline.stats import Stats

pytestmark = [pytest.mark.slow, pytest.mark.skipif("PHOTOGRAPHS" not in os.environ, reason="PHOTOGRAPHS names no index")]


@pytest.fixture(scope="module")
def photographs() -> SampleIndex:
    return SampleIndex.load(Path(os.environ["PHOTOGRAPHS"]))


@pytest.fixture(scope="module")
def stats(photographs: SampleIndex) -> Stats:
    return compute(photographs, "train", 256)


def test_training_crops(photographs: SampleIndex, stats: Stats) -> None:
    means, largest = [], []
    batch = min(50, len(photographs.ids("train")))
    with train_loader("archives", photographs, "train", PAPER, batch, 7, stats) as train:
        for found in train:
            drawn = train.planner.augmentation(found.ids, found.epochs)
            shift = lighting_shift(drawn.alphas, stats.eigenvalues, stats.eigenvectors)
            for row, id in enumerate(found.ids):
                expected = training_crop(photographs.read(int(id)), region="square", square_px=256, crop_px=227,
                                         top=int(drawn.top[row]), left=int(drawn.left[row]), mirror=bool(drawn.mirror[row]),
                                         shift=shift[row], mean=stats.mean_image)
                difference = np.abs(found.images[row].numpy() - expected)
                means.append(difference.mean())
                largest.append(difference.max())
    print(f"{len(means)} training crops: mean difference {np.mean(means):.3f}, largest {np.max(largest):.2f} grey levels")
    assert max(means) < MEAN_TOLERANCE and max(largest) <= LARGEST_TOLERANCE


def test_ten_views(photographs: SampleIndex, stats: Stats) -> None:
    means, largest = [], []
    with eval_loader("archives", photographs, "train", PAPER, 20, stats) as test:
        for found in test:
            seen = torch.stack(list(test.crops(found.images, 10)), dim=1).numpy()
            for row, id in enumerate(found.ids):
                difference = np.abs(seen[row] - ten_views(photographs.read(int(id)), square_px=256, crop_px=227,
                                                          mean=stats.mean_image))
                means.append(difference.mean())
                largest.append(difference.max())
    print(f"{len(means)} × 10 views: mean difference {np.mean(means):.3f}, largest {np.max(largest):.2f} grey levels")
    assert max(means) < MEAN_TOLERANCE and max(largest) <= LARGEST_TOLERANCE
