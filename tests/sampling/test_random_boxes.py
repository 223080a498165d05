"""Boxes of `crop: random_resized` against torchvision's RandomResizedCrop, whose draw is written out here."""
import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from pipeline.sampling.augment import Augmentation, augment, random_boxes

COUNT, SCALE, RATIO = 4000, (0.08, 1.0), (3 / 4, 4 / 3)


def torchvision_box(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """(top, left, height, width): `RandomResizedCrop.get_params` of torchvision, word by word but for its types."""
    area = height * width
    log_ratio = torch.log(torch.tensor(ratio))
    for _ in range(10):
        target_area = area * torch.empty(1).uniform_(scale[0], scale[1]).item()
        aspect_ratio = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1])).item()
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            i = torch.randint(0, height - h + 1, size=(1,)).item()
            j = torch.randint(0, width - w + 1, size=(1,)).item()
            return int(i), int(j), h, w
    in_ratio = float(width) / float(height)
    if in_ratio < min(ratio):
        w = width
        h = int(round(w / min(ratio)))
    elif in_ratio > max(ratio):
        h = height
        w = int(round(h * max(ratio)))
    else:
        w = width
        h = height
    return (height - h) // 2, (width - w) // 2, h, w


def drawn(height: int, width: int, scale: tuple[float, float] = SCALE, ratio: tuple[float, float] = RATIO,
          count: int = COUNT) -> np.ndarray:
    """(count, 4) as `torchvision_box`: ours."""
    ids, extents = np.arange(count), np.tile([[height, width]], (count, 1))
    sizes, central = random_boxes(5, ids % 7, ids, extents, scale, ratio)
    chosen: Augmentation = augment(5, ids % 7, ids, extents - sizes, mirror=True, lighting=0)
    places = np.where(central, (extents - sizes).T // 2, [chosen.top, chosen.left])
    return np.concatenate([places.T, sizes], axis=1)


@pytest.mark.parametrize("height,width", [(375, 500), (256, 256), (500, 333), (120, 900)])
@pytest.mark.parametrize("scale", [SCALE, (0.5, 0.9)])
def test_boxes_are_distributed_as_those_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    theirs = np.array([torchvision_box(height, width, scale, RATIO) for _ in range(COUNT)])
    ours = drawn(height, width, scale)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= [height, width]).all()
    quantities = {"share of the area": lambda boxes: boxes[:, 2] * boxes[:, 3] / (height * width),
                  "ratio": lambda boxes: boxes[:, 3] / boxes[:, 2],
                  "top": lambda boxes: boxes[:, 0], "left": lambda boxes: boxes[:, 1],
                  "top among its places": lambda boxes: boxes[:, 0] / np.maximum(1, height - boxes[:, 2])}
    for name, of in quantities.items():
        assert ks_2samp(of(ours), of(theirs)).pvalue > 0.01, name


@pytest.mark.parametrize("height,width", [(10, 400), (400, 10), (3, 4000), (1, 1), (1, 50)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    """An image so narrow that hardly a box of an allowed ratio and area lies in it gets its largest central one."""
    torch.manual_seed(0)
    scale = (0.9, 1.0)
    theirs = {torchvision_box(height, width, scale, RATIO) for _ in range(50)}
    assert {tuple(map(int, box)) for box in drawn(height, width, scale, count=50)} == theirs


def test_a_box_is_a_function_of_seed_epoch_and_id() -> None:
    ids, epochs = np.array([4, 9, 4, 9]), np.array([0, 0, 1, 1])
    extents = np.tile([[300, 400]], (4, 1))
    sizes, _ = random_boxes(1, epochs, ids, extents, SCALE, RATIO)
    for row in (3, 1):
        alone, _ = random_boxes(1, epochs[row:row + 1], ids[row:row + 1], extents[:1], SCALE, RATIO)
        assert np.array_equal(alone[0], sizes[row])
    assert len({tuple(size) for size in sizes.tolist()}) == 4
    assert not np.array_equal(random_boxes(2, epochs, ids, extents, SCALE, RATIO)[0], sizes)
