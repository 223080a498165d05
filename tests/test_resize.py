import numpy as np
import pytest
import torch
from PIL import Image
from tests.small_set import SIZES, picture

from pipeline import geometry
from pipeline.resize import Resizer

SIDE, CROP = 64, 51
IMAGES = [np.array(picture(number, *size)) for number, size in enumerate(SIZES)]


def crops(offsets: np.ndarray, side: int, short: int = SIDE, threads: int = 2) -> np.ndarray:
    """Crops of IMAGES at `offsets` of their central squares, from no more of them than `Regions.reach` says."""
    sizes = np.array([image.shape[:2] for image in IMAGES], np.int64)
    resized = geometry.resized(sizes, short)
    where = geometry.regions(sizes, resized, geometry.central(resized, short) + offsets, side)
    decoded = [torch.from_numpy(image[:rows, :columns].copy()) for image, (rows, columns) in zip(IMAGES, where.reach)]
    resizer = Resizer(side, threads)
    found = resizer(decoded, where).numpy().copy()
    assert 1 <= len(resizer.workers) <= threads
    resizer.close()
    return found


@pytest.mark.parametrize("short", [SIDE, 256, 31])
def test_a_crop_is_a_piece_of_the_whole_square_to_the_bit(short: int) -> None:
    side, random = short * 4 // 5, np.random.default_rng(1)
    squares = crops(np.zeros((len(IMAGES), 2), np.int64), short, short)
    for threads in (1, 3):
        offsets = random.integers(0, short - side + 1, (len(IMAGES), 2))
        found = crops(offsets, side, short, threads)
        for image, square, (top, left) in zip(found, squares, offsets, strict=True):
            assert np.array_equal(image, square[top:top + side, left:left + side])


def test_squares_are_those_of_pil() -> None:
    found = crops(np.zeros((len(IMAGES), 2), np.int64), SIDE)
    for pixels, image in zip(found, IMAGES, strict=True):
        height, width = geometry.resized(np.array([image.shape[:2]]), SIDE)[0].tolist()
        whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        top, left = (height - SIDE) // 2, (width - SIDE) // 2
        difference = np.abs(whole[top:top + SIDE, left:left + SIDE].astype(int) - pixels)
        assert difference.max() <= 2 and difference.mean() < 0.07  # weights of 16 bits, PIL's have 22
