import gc

import numpy as np
import pytest
import torch

from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.decoding.resize import Buffers
from pipeline.sampling.augment import Augmentation

S, CROP, B = 16, 11, 9
RANDOM = np.random.default_rng(3)


def augmentation() -> Augmentation:
    top, left = (RANDOM.integers(0, S - CROP + 1, B) for _ in range(2))
    return Augmentation(top, left, RANDOM.random(B) < 0.5, np.zeros((B, 3)), RANDOM.normal(0, 20, (B, 3)).astype(np.float32))


def by_hand(pixels: np.ndarray, mean: np.ndarray | None, centered: bool, wanted: Augmentation) -> np.ndarray:
    """(B, 3, crop, crop), written out."""
    out = np.empty((B, 3, CROP, CROP), np.float32)
    for b, c, y, x in np.ndindex(*out.shape):
        flipped = CROP - 1 - x if wanted.mirror[b] else x
        value = np.float32(pixels[b, c, y, flipped])
        if mean is not None and centered:
            value -= mean[c, (S - CROP) // 2 + y, (S - CROP) // 2 + x]
        elif mean is not None:
            value -= mean[c, wanted.top[b] + y, wanted.left[b] + flipped]
        out[b, c, y, x] = value + wanted.shift[b, c]
    return out


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_by_hand_in_rows_and_as_a_whole(mean: str, threads: int) -> None:
    pixels, wanted = RANDOM.integers(0, 256, (B, CROP, CROP, 3)).astype(np.uint8), augmentation()
    subtracted = None if mean == "channel" else RANDOM.uniform(0, 255, (3, S, S)).astype(np.float32)
    planar = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    normalizer = Normalizer(CROP, Finish(subtracted, mean == "image_center"), threads=threads)
    expected = by_hand(planar.numpy(), subtracted, mean == "image_center", wanted)
    for rows in (list(planar), planar, planar.contiguous()):
        assert np.array_equal(normalizer.begin(rows, wanted)().numpy(), expected)
    drawn = map(torch.from_numpy, (wanted.top, wanted.left, wanted.mirror, wanted.shift))
    assert np.array_equal(normalizer.whole(planar, *drawn).numpy(), expected)
    some = [4, 0, 4]
    assert np.array_equal(normalizer.begin(list(planar[some]), wanted.rows(some))().numpy(), expected[some])
    normalizer.close()


def test_memory_is_used_again_only_when_nobody_refers_to_it() -> None:
    buffers = Buffers()
    first = buffers.take(2, 3)
    place, part = first.data_ptr(), first[1:]
    del first
    second = buffers.take(2, 3)
    assert second.data_ptr() != place  # `part` still looks at it
    del part
    gc.collect()
    assert buffers.take(2, 3).data_ptr() == place
    assert buffers.take(4, 3).shape == (4, 3)
