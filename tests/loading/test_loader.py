"""Loaders that decode: pixels against an oracle, the stream, resume, what is freed and refused."""
import gc
import json
import os
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from tests.helpers.digests import digest
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.oracle import LARGEST_TOLERANCE, MEAN_TOLERANCE, PAPER, ten_views, training_crop
from tests.helpers.small_set import photographs, write_set

from pipeline.config import DataConfig, LoaderConfig
from pipeline.sampling.augment import lighting_shift
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.loading.eval_loader import crops
from pipeline.compute_stats import compute
from pipeline.stats import Stats

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="channel")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("photos"), photographs(23), photographs(30)[23:])


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> dict[int, Stats]:
    return {px: compute(photos, "train", px) for px in (76, 256)}


def loader(index: SampleIndex, stats: dict[int, Stats], data: DataConfig = SMALL, batch: int = 6,
           **options: object) -> TrainLoader:
    return train_loader("archives", index, "train", data, batch, 7, stats[data.square_px], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("region,mean", [("square", "image"), ("square", "image_center"), ("square", "channel"),
                                         ("full", "channel"), ("full", "image_center")])
def test_training_crops_equal_the_oracle(photos: SampleIndex, stats: dict[int, Stats], region: str, mean: str) -> None:
    data = DataConfig(region=region, square_px=256, crop_px=227, mirror=True, lighting=0.1, mean=mean)
    s = stats[256]
    with loader(photos, stats, data) as train:
        batches = list(train)
        mirrored = set()
        for batch in batches:
            drawn = train.planner.augmentation(batch.ids, batch.epochs)
            shift = lighting_shift(drawn.alphas, s.eigenvalues, s.eigenvectors)
            low = (256 - 227) // 2
            subtract = {"image": s.mean_image, "channel": s.channel_mean,
                        "image_center": s.mean_image[low:low + 227, low:low + 227]}[mean]
            for row, id in enumerate(batch.ids):
                expected = training_crop(photos.read(int(id)), region=region, square_px=256, crop_px=227,
                                         top=int(drawn.top[row]), left=int(drawn.left[row]), mirror=bool(drawn.mirror[row]),
                                         shift=shift[row], mean=subtract)
                difference = np.abs(batch.images[row].numpy() - expected)
                assert difference.mean() < MEAN_TOLERANCE and difference.max() <= LARGEST_TOLERANCE, photos.name(int(id))
                mirrored.add(bool(drawn.mirror[row]))
        assert mirrored == {False, True}
        assert np.abs(np.concatenate([train.planner.augmentation(b.ids, b.epochs).alphas for b in batches])).max() > 0.05


@pytest.mark.parametrize("mean", ["image", "channel"])
def test_ten_views_equal_the_oracle(photos: SampleIndex, stats: dict[int, Stats], mean: str) -> None:
    data = DataConfig(region="square", square_px=256, crop_px=227, mirror=True, lighting=0.1, mean=mean)
    s = stats[256]
    subtract = s.mean_image if mean == "image" else s.channel_mean
    seen = 0
    with eval_loader("archives", photos, "val", data, 3, s) as test:
        for batch in test:
            found = torch.stack(list(test.crops(batch.images, 10)), dim=1).numpy()
            for row, id in enumerate(batch.ids):
                expected = ten_views(photos.read(int(id)), square_px=256, crop_px=227, mean=subtract)
                difference = np.abs(found[row] - expected)
                assert difference.mean() < MEAN_TOLERANCE and difference.max() <= LARGEST_TOLERANCE
                seen += 1
            (centre,) = test.crops(batch.images, 1)
            assert torch.equal(centre, torch.from_numpy(found[:, 4]))
    assert seen == 7


def test_test_views_subtract_the_central_piece_like_the_release(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    data = DataConfig(region="square", square_px=256, crop_px=227, mirror=True, lighting=0, mean="image_center")
    with eval_loader("archives", photos, "val", data, 3, stats[256]) as test, \
            eval_loader("archives", photos, "val", data, 3, None) as plain:
        batch, pixels = next(iter(test)), next(iter(plain)).images.permute(0, 3, 1, 2).float()
        piece = torch.from_numpy(stats[256].mean_image_chw[:, 14:14 + 227, 14:14 + 227])
        for found, expected in zip(test.crops(batch.images, 10), crops(pixels, 227, 10), strict=True):
            assert torch.equal(found, expected - piece)


def test_every_test_image_comes_once_for_any_number_of_ranks(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    for world in (1, 2, 3):
        ids = []
        for rank in range(world):
            with eval_loader("archives", photos, "train", SMALL, 4, stats[76], shard=(rank, world)) as test:
                for _ in range(2):  # a second pass is the same pass
                    found = [batch.ids for batch in test]
                assert len(found) == len(test)
                ids += list(np.concatenate(found))
        assert sorted(ids) == list(photos.ids("train"))


def test_each_epoch_holds_every_sample_once(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train:
        ids, epochs, lengths = [], [], []
        for epoch in range(6):
            assert train.epoch == epoch
            length, count = len(train), 0
            for batch in train:
                ids.append(batch.ids)
                epochs.append(batch.epochs)
                count += 1
            assert count == length
            lengths.append(count)
    assert sum(lengths) == 6 * 23 / 6 and set(lengths) == {3, 4}
    flat, of = np.concatenate(ids), np.concatenate(epochs)
    for epoch in range(6):
        assert sorted(flat[of == epoch]) == list(photos.ids("train"))
    assert not np.array_equal(flat[of == 0], flat[of == 1])


def test_the_stream_is_the_same_for_any_ranks_threads_and_prefetch(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    def stream(world: int, machine: LoaderConfig) -> str:
        loaders = [loader(photos, stats, batch=8, shard=(rank, world), machine=machine) for rank in range(world)]
        rows = [list(train) for train in loaders]
        for train in loaders:
            train.close()
        whole = [Batch(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]),
                       np.concatenate([part.ids for part in parts]), np.concatenate([part.epochs for part in parts]),
                       parts[0].step) for parts in zip(*rows, strict=True)]
        return digest(whole)

    expected = stream(1, LoaderConfig(threads=1, prefetch=1, read_threads=0))
    assert stream(2, LoaderConfig(threads=1)) == expected
    assert stream(4, LoaderConfig(threads=2)) == expected
    for threads in (1, 2, 3):
        assert stream(1, LoaderConfig(threads=threads, prefetch=threads + 1, read_threads=threads)) == expected


def test_resume_at_every_step_continues_the_stream(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train:
        states, batches = [], []
        for _ in range(3):
            for batch in train:
                batches.append(batch)
                states.append(json.loads(json.dumps(train.state_dict())))
    with loader(photos, stats) as other:
        for done, state in enumerate(states, start=1):
            other.load_state_dict(state)
            assert other.step == done
            rest = []
            while other.step < len(batches):
                rest += list(other)
            assert digest(rest) == digest(batches[done:done + len(rest)]) and done + len(rest) == len(batches)


def test_a_loader_left_in_mid_epoch_goes_on_there(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train:
        first = next(iter(train))
        rest = list(train)
        assert [first.step] + [batch.step for batch in rest] == [0, 1, 2, 3]
        train.close()
        assert next(iter(train)).step == 4
        with pytest.raises(StopIteration):
            while True:
                next(train)


def test_state_of_another_run_is_refused(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train:
        for key, value in (("seed", 8), ("batch", 5), ("images", "0" * 64)):
            with pytest.raises(ValueError, match=rf"loader state {key} \(={value}\) must equal this loader's"):
                train.load_state_dict({**train.state_dict(), key: value})


def test_what_is_no_state_is_refused(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train:
        for state, message in (({}, r"loader state \(=empty\) must have .*step"), ({"step": 1}, r"\(=step\) must have batch"),
                               ({**train.state_dict(), "step": -5}, r"step \(=-5\) must be a whole number, at least 0"),
                               ({**train.state_dict(), "step": "3"}, r"step \(='3'\) must be a whole number")):
            with pytest.raises(ValueError, match=message):
                train.load_state_dict(state)
        assert train.step == 0


def test_a_loader_that_is_dropped_is_freed(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    """Its threads, its decoder and what they hold, closed by nobody."""
    train, test = loader(photos, stats), eval_loader("archives", photos, "val", SMALL, 3, None)
    next(train), next(iter(test))
    chains = [weakref.ref(train.chain), weakref.ref(test.chain)]
    del train, test
    deadline = time.monotonic() + 60
    while any(chain() is not None for chain in chains) or {"loader", "closer"} & {one.name for one in threading.enumerate()}:
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_process_is_refused_at_once(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with loader(photos, stats) as train, eval_loader("archives", photos, "val", SMALL, 3, None) as test:
        next(train)
        uses = (lambda: next(train), lambda: next(iter(train)), lambda: next(iter(test)), lambda: train.load_state_dict({}))
        child = os.fork()
        if not child:
            refused = 0
            for use in uses:
                try:
                    use()
                except RuntimeError as error:
                    refused += "cannot be used in process" in str(error)
            train.close()
            os._exit(refused)
        deadline, (ended, status) = time.monotonic() + 60, (0, 0)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended and os.waitstatus_to_exitcode(status) == len(uses)
        assert next(train).step == 1


def test_wrong_use_is_explained(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with pytest.raises(ValueError, match=r"stats \(=76 px\) must be computed at data.square_px \(=256\); run"):
        train_loader("archives", photos, "train", PAPER, 4, 0, stats[76])
    with pytest.raises(ValueError, match=r"views \(=5\) must be 1 \(centre\) or 10"):
        list(crops(torch.zeros(1, 3, 8, 8), 4, 5))
    with pytest.raises(ValueError, match=r"batch_size \(=24\) must not exceed the 23 samples"):
        loader(photos, stats, batch=24)
    with pytest.raises(ValueError, match=r"batch_size \(=0\) must be at least 1"):
        eval_loader("archives", photos, "val", SMALL, 0, stats[76])


def test_taking_from_two_iterators_at_once_is_told(photos: SampleIndex, stats: dict[int, Stats]) -> None:
    with eval_loader("archives", photos, "train", SMALL, 4, stats[76]) as test:
        first = iter(test)
        next(first)
        assert len(next(iter(test)).ids) == 4
        with pytest.raises(RuntimeError, match="this loader was closed, or iterated anew, while its batches were being taken"):
            list(first)
