"""The GPU's DALI graph, run with CPU operators: its pixels, and its arithmetic to the bit against Normalizer."""
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.decoded import pixels, read, unfinished
from tests.helpers.loaders import train_loader
from tests.helpers.small_set import encode, photographs, picture, write_set

from pipeline.compute_stats import compute
from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding.graph import DecodeSettings, Finish
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import DecodingChain
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.reading.quarantine import Quarantine
from pipeline.sampling.batch_plan import BatchPlan, plan_squares
from pipeline.stats import Stats

DATA = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
B = 8


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("graph"), photographs(20), photographs(24)[20:])


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Images that are not resized."""
    return write_set(tmp_path_factory.mktemp("squares"), [encode(picture(i, 76, 76 + i)) for i in range(20)])


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> Stats:
    return compute(photos, "train", 76)


def squares_of(index: SampleIndex) -> Iterator[BatchPlan]:
    for step, ids in enumerate(np.array_split(index.ids("train"), 3)):
        plan = plan_squares(index, DATA.square_px, step, ids)
        yield replace(plan, encoded=[np.frombuffer(index.read(int(id)), np.uint8) for id in ids])


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("resample", [True, False])
def test_what_follows_the_resize_equals_normalizer_to_the_bit(photos: SampleIndex, squares: SampleIndex, stats: Stats, mean: str,
                                                              channels_last: bool, resample: bool) -> None:
    """Flips, pieces of the mean image and shifts of every row, in whole batches and a last short one; and the layout."""
    index, data = photos if resample else squares, replace(DATA, mean=mean)
    mean_image = None if mean == "channel" else stats.mean_image_chw
    with train_loader("archives", index, "train", data, B, 1, stats) as loader:
        plans, settings = list(read(loader)), loader.context.decoding(loader.context.ids, B, data.crop_px)
        normalizer = loader.context.normalizer(data.crop_px, mean_image)
        plans[-1] = plans[-1].rows([0, 2, 1])
        assert settings.resample == resample and not settings.in_dali
        plain = pixels([unfinished(plan) for plan in plans], replace(settings, finish=Finish(None, False, channels_last)))
        found = pixels(plans, replace(settings, finish=replace(loader.context.finish(mean_image), channels_last=channels_last)))
        assert {bool(flip) for plan in plans for flip in plan.augmentation.mirror} == {False, True}
        for plan, before, after in zip(plans, plain, found, strict=True):
            expected = normalizer.begin(before.to(torch.uint8), plan.augmentation)()
            assert torch.equal(after, expected) and after.dtype == torch.float32
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert after.is_contiguous(memory_format=layout)
        normalizer.close()


def test_pixels_are_those_of_the_cpus_path_but_for_the_resize(photos: SampleIndex, squares: SampleIndex) -> None:
    """Within a grey level, but for the square's outermost pixels, some of which see the image's edge, where the two treat the
    filter's overhang differently. Of whole images they are those of regions but for rounding. All the same without a resize."""
    for index, inside, edge in ((photos, 1, 12), (squares, 0, 0)):
        context = LoaderContext(index, "train", DATA, LoaderConfig(), None, Monitor())
        plans, settings = list(squares_of(index)), context.decoding(context.ids, B, DATA.square_px)
        here, in_dali = torch.cat(pixels(plans, settings)), replace(settings, finish=Finish(None, False, False))
        region, whole = (torch.cat(pixels(plans, replace(in_dali, machine=LoaderConfig(gpu_decode=choice))))
                         for choice in ("region", "whole"))
        difference = (here.permute(0, 3, 1, 2) - region).abs()
        assert difference.max() <= edge and difference[..., 1:-1, 1:-1].max() <= inside
        assert (region - whole).abs().max() <= inside and (region != whole).float().mean() <= 1e-4 * inside


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_loader_that_finishes_in_the_graph(tmp_path: Path, stats: Stats, channels_last: bool) -> None:
    """The chain a GPU has: order, labels and a stand-in for a corrupt sample are those of the CPU's, and the images nearly."""
    blobs = photographs(14)
    blobs[5] = blobs[5][:len(blobs[5]) // 3]
    index, machine = write_set(tmp_path, blobs), LoaderConfig(quarantine_budget=0.1, channels_last=channels_last)

    def loader() -> TrainLoader:
        return train_loader("archives", index, "train", DATA, 4, 1, stats, machine=machine, quarantine=Quarantine(9))

    with loader() as here, loader() as there:
        chain = there.chain
        assert isinstance(chain, DecodingChain)
        chain.settings = replace(chain.settings, finish=there.context.finish(stats.mean_image_chw))
        for one, other in zip(here, there, strict=True):
            assert np.array_equal(one.ids, other.ids) and 5 not in other.ids and torch.equal(one.labels, other.labels)
            difference = (one.images - other.images).abs()
            assert difference.mean() < 0.5 and difference.max() < 12.01
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert other.images.is_contiguous(memory_format=layout)


def test_the_decoders_name_tells_what_changes_pixels() -> None:
    def name(device_id: int | None = 0, **machine: object) -> str:
        return DecodeSettings(B, 67, True, LoaderConfig(**machine), 1, device_id).decoder  # type: ignore[arg-type]

    names = [name(None), name(), name(gpu_decode="whole"), name(fancy_upsampling=False), name(hw_decoder_load=0.3)]
    assert len(set(names)) == 5 and name() == name(gpu_decode="region", threads=3)
    shared = DecodeSettings(B, 67, True, LoaderConfig(hw_decoder_load=0.3), 1, 0)
    assert shared.by_sample().decoder == name(hw_decoder_load=1.0)
    assert replace(shared, machine=LoaderConfig(hw_decoder_load=0)).by_sample().decoder == name(hw_decoder_load=0)
