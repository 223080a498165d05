import gc

import numpy as np
import pytest
import torch

from pipeline.decoding.normalize import Buffers, Colour, Finish

S, CROP, B = 16, 11, 9
RANDOM = np.random.default_rng(3)


def finish(cut: bool) -> Finish:
    places = [RANDOM.integers(0, S - CROP + 1, B) for _ in range(4)]
    zeros = np.zeros(B, np.int64)
    return Finish(places[0] if cut else zeros, places[1] if cut else zeros, RANDOM.random(B) < 0.5, places[2], places[3],
                  RANDOM.random(B) < 0.5, RANDOM.normal(0, 20, (B, 3)).astype(np.float32))


def by_hand(pixels: np.ndarray, mean: np.ndarray | None, wanted: Finish) -> np.ndarray:
    """(B, 3, crop, crop), written out."""
    out = np.empty((B, 3, CROP, CROP), np.float32)
    for b in range(B):
        for c in range(3):
            for y in range(CROP):
                for x in range(CROP):
                    column = CROP - 1 - x if wanted.mirror[b] else x
                    value = np.float32(pixels[b, c, wanted.top[b] + y, wanted.left[b] + column])
                    if mean is not None:
                        column = CROP - 1 - x if wanted.mean_mirror[b] else x
                        value -= mean[c, wanted.mean_top[b] + y, wanted.mean_left[b] + column]
                    out[b, c, y, x] = value + wanted.shift[b, c]
    return out


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_by_hand_in_rows_and_as_a_whole(cut: bool, with_mean: bool, threads: int) -> None:
    side = S if cut else CROP
    pixels, wanted = RANDOM.integers(0, 256, (B, side, side, 3)).astype(np.uint8), finish(cut)
    mean = RANDOM.uniform(0, 255, (3, S, S)).astype(np.float32) if with_mean else None
    planar = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    colour = Colour(CROP, mean, threads=threads)
    expected = by_hand(pixels.transpose(0, 3, 1, 2), mean, wanted)
    assert np.array_equal(colour(list(planar), wanted).numpy(), expected)
    assert np.array_equal(colour.whole(planar, wanted).numpy(), expected)
    some = np.array([4, 0, 4])
    assert np.array_equal(colour(list(planar[some]), wanted.rows(some)).numpy(), expected[some])
    colour.close()


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
