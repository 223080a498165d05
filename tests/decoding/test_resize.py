import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.small_set import SIZES, picture

from pipeline.decoding import geometry
from pipeline.decoding.resize import Resizer, needed, planar_crops

SIDE, CROP = 64, 51
# Besides usual sizes those just below the squares of the tests, where what is decoded has as many lines as the result.
NEAR = [(75, 75), (62, 62), (63, 80), (61, 61), (252, 252), (252, 336), (253, 337), (254, 508), (255, 300), (30, 30), (29, 43)]
IMAGES = [np.array(picture(number, *size)) for number, size in enumerate([*SIZES, *NEAR])]


def crops(offsets: np.ndarray, side: int, short: int = SIDE, threads: int = 2) -> np.ndarray:
    """Crops of IMAGES at `offsets` of their central squares, from no more of them than `Regions.reach` says."""
    sizes = np.array([image.shape[:2] for image in IMAGES], np.int64)
    resized = geometry.resized(sizes, short)
    where = geometry.regions(sizes, resized, geometry.central(resized, short) + offsets, side)
    decoded = [torch.from_numpy(image[:rows, :columns].copy()) for image, (rows, columns) in zip(IMAGES, where.reach)]
    resizer = Resizer(side, threads)
    found = resizer(decoded, where).numpy().copy()
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


def test_freaks_need_little_memory_and_are_hardly_off() -> None:
    """A picture of 3 × 4000 pixels resized to a short side of 256 would take 260 MB up to its middle."""
    image = np.array(picture(1, 3, 4000))
    size, resized = np.array([image.shape[:2]], np.int64), geometry.resized(np.array([image.shape[:2]], np.int64), 256)
    first = geometry.central(resized, 256)
    where = geometry.regions(size, resized, first, 227)
    rows, columns = where.reach[0]
    found = planar_crops([torch.from_numpy(image[:rows, :columns].copy())], where, 227)[0]
    piece = Image.fromarray(image).resize((227, 227), Image.Resampling.BILINEAR, box=tuple(
        float(number) for number in (first[0, 1] * 3 / 256, 0, (first[0, 1] + 227) * 3 / 256, 227 * 3 / 256)))
    assert needed(first[0].tolist(), (227, 227)) > 64 << 20
    difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(piece))
    assert difference.mean() < 0.5
