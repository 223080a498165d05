"""Order and draws: sampler, counter, draws, geometry."""
import numpy as np
import pytest

from pipeline import rng as counter
from pipeline.decoding import geometry
from pipeline.sampling.augment import augment, lighting_shift
from pipeline.sampling.sampler import Sampler, epoch_of, first_step


def test_random_bits_are_pinned() -> None:
    """A change here changes every run: resumed ones would silently differ."""
    found = counter.bits(2012, counter.Purpose.ORDER, 3, np.arange(3))
    assert [hex(int(word)) for word in found] == [
        "0xcfeea194883362ea", "0x4b9b36a03ac54592", "0xdec3963832f06134"]
    assert counter.uniform(1, counter.Purpose.TOP, 0, np.arange(1000)).max() < 1


def test_keys_do_not_collide() -> None:
    words = [counter.bits(seed, purpose, epoch, np.arange(500)) for seed in (0, 1) for purpose in counter.Purpose
             for epoch in (0, 1, 500)]
    assert len(np.unique(np.concatenate(words))) == 2 * len(counter.Purpose) * 3 * 500
    assert counter.bits(0, counter.Purpose.ORDER, 0, 1)[0] != counter.bits(0, counter.Purpose.ORDER, 1, 0)[0]


def test_uniform_and_normal_numbers_have_their_moments() -> None:
    n = 200_000
    u = counter.uniform(5, counter.Purpose.LEFT, 1, np.arange(n))
    z = counter.normal(5, counter.Purpose.LIGHTING, 1, np.arange(n))
    # five standard errors
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / n) and abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / n) and abs((z ** 4).mean() - 3) < 5 * np.sqrt(96 / n)
    assert np.abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / np.sqrt(n)
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("count,batch", [(10, 3), (12, 4), (7, 7), (101, 10), (5, 1)])
def test_steps_tile_the_epochs(count: int, batch: int) -> None:
    sampler = Sampler(np.arange(count), batch, 0)
    steps = [step for epoch in range(9) for step in sampler.steps(epoch)]
    assert steps == list(range(first_step(9, count, batch)))
    for epoch in range(9):
        assert all(epoch_of(step, count, batch) == epoch for step in sampler.steps(epoch))
    ids, epochs = map(np.concatenate, zip(*(sampler.take(step) for step in steps), strict=True))
    for epoch in range(8):
        assert sorted(ids[epochs == epoch]) == list(range(count))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_one_global_order(world: int) -> None:
    ids = np.arange(100, 137)
    whole = Sampler(ids, 8, 3)
    for step in range(20):
        parts = [Sampler(ids, 8, 3, (rank, world)).take(step) for rank in range(world)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), whole.take(step)[0])
        assert np.array_equal(np.concatenate([part[1] for part in parts]), whole.take(step)[1])


def test_orders_are_uniform() -> None:
    """Each of four ids comes first about equally often over epochs, and epochs and seeds differ."""
    first = [int(Sampler(np.arange(4), 1, 0).order(epoch)[0]) for epoch in range(2000)]
    assert (np.abs(np.bincount(first, minlength=4) - 500) < 5 * np.sqrt(2000 * 3 / 16)).all()
    a, b = Sampler(np.arange(1000), 1, 0), Sampler(np.arange(1000), 1, 1)
    assert not np.array_equal(a.order(0), a.order(1)) and not np.array_equal(a.order(0), b.order(0))


def test_wrong_shards_and_batches_are_explained() -> None:
    for shard, batch, ids, message in (((2, 2), 4, 9, r"shard \(=\(2, 2\)\) must be"), ((0, 3), 4, 9, "divisible by the 3 ranks"),
                                       ((0, 1), 0, 9, r"batch_size \(=0\) must be at least 1"),
                                       ((0, 1), 4, 0, "must not be empty"),
                                       ((0, 1), 4, 3, r"batch_size \(=4\) must not exceed the 3 samples")):
        with pytest.raises(ValueError, match=message):
            Sampler(np.arange(ids), batch, 0, shard)


def test_draws_cover_every_place_evenly_and_belong_to_the_sample() -> None:
    ids = np.arange(30_000)
    drawn = augment(1, np.zeros_like(ids), ids, np.full((len(ids), 2), 29), mirror=True, lighting=0.1)
    for offset in (drawn.top, drawn.left):
        counts = np.bincount(offset, minlength=30)
        assert len(counts) == 30 and (np.abs(counts - 1000) < 5 * np.sqrt(1000)).all()
    assert abs(drawn.mirror.mean() - 0.5) < 5 * np.sqrt(0.25 / len(ids))
    assert np.abs(drawn.alphas.std(axis=0) - 0.1).max() < 0.1 * 5 / np.sqrt(2 * len(ids))
    assert np.abs(np.corrcoef(np.column_stack([drawn.top, drawn.left, drawn.mirror, drawn.alphas]).T) - np.eye(6)).max() < 0.03
    some = augment(1, np.zeros(3, np.int64), ids[[5, 9, 5]], np.full((3, 2), 29), mirror=True, lighting=0.1)
    assert list(some.top) == [drawn.top[5], drawn.top[9], drawn.top[5]] and np.array_equal(some.alphas[1], drawn.alphas[9])
    still = augment(1, np.zeros_like(ids), ids, np.zeros((len(ids), 2), np.int64), mirror=False, lighting=0)
    assert not still.mirror.any() and not still.alphas.any() and not still.top.any()


def test_lighting_by_hand() -> None:
    vectors = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
    shift = lighting_shift(np.array([[0.1, -0.2, 0.5]]), np.array([400.0, 100.0, 4.0]), vectors)
    assert np.allclose(shift, [[0.1 * 20, 0.5 * 2, -0.2 * 10]]) and shift.dtype == np.float32


def test_resized_sizes_by_hand() -> None:
    sizes = np.array([[256, 256], [512, 256], [375, 500], [1, 3], [333, 500]])
    assert geometry.resized(sizes, 256).tolist() == [[256, 256], [512, 256], [256, 341], [256, 768], [256, 384]]
    assert geometry.central(np.array([[256, 341]]), 256).tolist() == [[0, 42]]


def test_regions_by_hand() -> None:
    sizes, resized = np.array([[512, 768]] * 2), np.array([[256, 384]] * 2)
    found = geometry.regions(sizes, resized, np.array([[10, 20], [0, 157]]), 227)
    assert found.anchor.tolist() == [[16, 36], [0, 310]] and found.shape.tolist() == [[462, 462], [458, 458]]
    assert found.start.tolist() == [[4, 4], [0, 4]] and found.end.tolist() == [[458, 458], [454, 458]]


def test_regions_of_an_image_of_the_right_size_are_the_crop_itself() -> None:
    sizes = np.array([[256, 384]])
    found = geometry.regions(sizes, sizes, np.array([[10, 20]]), 227)
    assert found.anchor.tolist() == [[10, 20]] and found.shape.tolist() == [[227, 227]]
    assert found.start.tolist() == [[0, 0]] and found.end.tolist() == [[227, 227]]


def test_a_crops_coordinates_are_those_of_the_square_exactly() -> None:
    """In float32 and whatever rectangle is decoded; and no sample is moved by more than 1/128 of a source pixel."""
    sizes = np.random.default_rng(0).integers(257, 513, (200, 2))
    resized = geometry.resized(sizes, 256)
    first = geometry.central(resized, 256)
    square = geometry.regions(sizes, resized, first, 256)
    for place in ([0, 0], [29, 3], [7, 22]):
        crop = geometry.regions(sizes, resized, first + place, 227)
        scale = (square.end - square.start) / np.float32(256)
        assert np.array_equal((crop.end - crop.start) / np.float32(227), scale)
        moved = square.anchor + square.start + np.float32(place) * scale
        assert np.array_equal(crop.anchor + crop.start, moved)
        exact = (first + place) * sizes / resized
        assert np.abs(moved - exact).max() < 1 / 128
