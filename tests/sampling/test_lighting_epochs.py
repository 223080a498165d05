"""data.lighting_epochs: lighting noise in the first epochs only, sample by sample, whatever the tier and the batches."""
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.digests import take
from tests.helpers.loaders import train_loader
from tests.helpers.packed_set import write_packed
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import encode, picture

from pipeline.config import DataConfig, LoaderConfig
from pipeline.sampling.augment import augment
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from pipeline.compute_stats import compute
from pipeline.stats import Stats
from train.recipe import parse

COUNT, BATCH, LIT = 21, 8, 2  # 21 samples in batches of 8: batch 5 has the last 2 samples of epoch 1 and the first 6 of epoch 2
LAST = 10  # step; its samples are of epochs 3 and 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_packed(tmp_path_factory.mktemp("packed"), [encode(picture(i, 76, 76)) for i in range(COUNT)], 5)


@pytest.fixture(scope="module")
def stats(packed: SampleIndex) -> Stats:
    return compute(packed, "train", 76)


def pixels(lighting: float, epochs: int = 0, mean: str = "image") -> DataConfig:
    return DataConfig("square", 76, 67, True, lighting, mean, lighting_epochs=epochs)


def loader(tier: str, index: SampleIndex, stats: Stats, folder: Path, data: DataConfig, **machine: object) -> TrainLoader:
    """`tier` may end in the memory of tier resident."""
    tier, _, memory = tier.partition(" ")
    settings = LoaderConfig(threads=1, resident_memory=memory or "ram", resident_folder=str(folder),
                            **machine)  # type: ignore[arg-type]
    return train_loader(tier, index, "train", data, BATCH, 7, stats, window=6, lanes=2, machine=settings)


def test_draws_by_hand() -> None:
    epochs, ids = np.array([0, 1, 1, 2, 3]), np.array([4, 4, 5, 4, 5])
    rooms = np.full((5, 2), 29)
    always = augment(7, epochs, ids, rooms, mirror=True, lighting=0.1)
    for lit, zero in ((0, []), (1, [1, 2, 3, 4]), (2, [3, 4]), (3, [4]), (4, [])):
        drawn = augment(7, epochs, ids, rooms, mirror=True, lighting=0.1, lighting_epochs=lit)
        expected = always.alphas.copy()
        expected[zero] = 0
        assert np.array_equal(drawn.alphas, expected) and always.alphas.all()
        for one, other in ((drawn.top, always.top), (drawn.left, always.left), (drawn.mirror, always.mirror)):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("mean", ["image", "channel"])
@pytest.mark.parametrize("tier", ["packed", "streamed", "resident", "resident gpu"])
def test_each_sample_has_it_until_its_own_epoch(packed: SampleIndex, stats: Stats, tmp_path: Path, tier: str, mean: str) -> None:
    """Before: the bits of a run that is lit throughout. From there on: those of one that never is. Mixed batches: row by row."""
    found = []
    for data in (pixels(0.1, LIT, mean), pixels(0.1, 0, mean), pixels(0, 0, mean)):
        with loader(tier, packed, stats, tmp_path, data) as train:
            found.append(take(train, LAST + 1))
    mixed = 0
    for ours, lit, unlit in zip(*found, strict=True):
        assert np.array_equal(ours.ids, lit.ids) and np.array_equal(ours.epochs, lit.epochs)
        early = ours.epochs < LIT
        mixed += 0 < early.sum() < BATCH
        assert torch.equal(ours.images[early], lit.images[early]) and torch.equal(ours.images[~early], unlit.images[~early])
        assert all(not torch.equal(*images) for images in zip(lit.images, unlit.images, strict=True))
    assert mixed == 1


@pytest.mark.parametrize("tier", ["packed", "streamed", "resident"])
def test_a_resume_anywhere_around_the_boundary_goes_on_with_the_same_bits(packed: SampleIndex, stats: Stats, tmp_path: Path,
                                                                          tier: str) -> None:
    data = pixels(0.1, LIT)
    with loader(tier, packed, stats, tmp_path, data) as train:
        whole = take(train, LAST + 1)
    for done in range(3, LAST):
        with loader(tier, packed, stats, tmp_path, data, prefetch=1 + done % 3, queue=1 + done % 2) as train:
            train.load_state_dict({**train.state_dict(), "step": done})
            for ours, theirs in zip(take(train, min(3, LAST + 1 - done)), whole[done:], strict=False):
                assert ours.step == theirs.step and torch.equal(ours.images, theirs.images)


def test_negative_epochs_are_refused_and_no_epochs_said_are_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.lighting_epochs \(=-1\) must not be negative; 0 is colour jitter in every"):
        pixels(0.1, -1)
    recipe = str(write_recipe(tmp_path))
    unsaid, none, some = (parse(["--config", recipe, *words]).config for words in
                          ([], ["--data.lighting_epochs=0"], ["--data.lighting_epochs=2"]))
    assert unsaid.data.lighting_epochs == 0 and some.data.lighting_epochs == 2
    assert unsaid.fingerprint() == none.fingerprint() != some.fingerprint()
    with pytest.raises(ValueError, match=r"data.lighting_epochs \(=-3\)"):
        parse(["--config", recipe, "--data.lighting_epochs=-3"])
