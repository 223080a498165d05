"""Loaders on a GPU: pixels, threads and streams. Tests of this folder run with `pytest -m gpu`, and are deselected by default."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import nvidia.dali as dali
import pytest
import torch
from tests.helpers.decoded import pixels, read, unfinished
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.small_set import photographs, write_set

from pipeline.decoding.normalize import Finish, Normalizer
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.decoding.transfer import to_device
from pipeline.reading.quarantine import Quarantine
from pipeline.compute_stats import compute
from pipeline.stats import Stats
from pipeline.sampling.augment import Augmentation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
# nvJPEG's inverse DCT and chroma upsampling round otherwise than libjpeg-turbo's: a grey level nearly everywhere, more at
# sharp colour edges; and DALI's resize repeats the image's outermost pixels where the CPU's shortens the filter.
MEAN_TOLERANCE, LARGEST_TOLERANCE = 1.0, 24.0
# What 4:2:0 planes cost these drawn pictures, whose colour is as fine as their brightness: 9.6 grey levels on average (CPUs too).
FINE_COLOUR = 12.0


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_crops_decoded_on_the_gpu_equal_the_cpus(photos: SampleIndex, stats: Stats, mean: str) -> None:
    data = DataConfig("square", 76, 67, True, 0.1, mean)
    with train_loader("archives", photos, "train", data, 8, 1, stats) as cpu, \
            train_loader("archives", photos, "train", data, 8, 1, stats, device="cuda") as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            assert there.images.device == torch.device("cuda", 0) and there.labels.device == there.images.device
            assert np.array_equal(here.ids, there.ids) and torch.equal(here.labels, there.labels.cpu())
            difference = (here.images - there.images.cpu()).abs()
            assert difference.mean() < MEAN_TOLERANCE and difference.max() < LARGEST_TOLERANCE


def test_test_squares_decoded_on_the_gpu_equal_the_cpus(photos: SampleIndex, stats: Stats) -> None:
    with eval_loader("archives", photos, "val", SMALL, 3, stats) as cpu, \
            eval_loader("archives", photos, "val", SMALL, 3, stats, device="cuda") as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            assert (here.images - there.images.cpu()).abs().mean() < MEAN_TOLERANCE


def test_batches_held_while_others_are_made_keep_their_pixels(photos: SampleIndex, stats: Stats) -> None:
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda", machine=LoaderConfig(prefetch=3)) as loader:
        held, copies = [], []
        for _ in range(4):
            for batch in loader:
                held.append(batch.images)
                copies.append(batch.images.clone())
    assert all(torch.equal(one, other) for one, other in zip(held, copies, strict=True))


def test_a_corrupt_image_is_replaced_on_the_gpu(tmp_path: Path) -> None:
    blobs = photographs(16)
    blobs[5] = blobs[5][:len(blobs[5]) // 3]
    index = write_set(tmp_path, blobs)
    stats = compute(index, "train", 76, machine=LoaderConfig(quarantine_budget=0.1))
    with train_loader("archives", index, "train", SMALL, 4, 1, stats, device="cuda", quarantine=Quarantine(1)) as loader:
        ids = np.concatenate([batch.ids for batch in loader])
    assert len(ids) == 16 and 5 not in ids


def test_images_are_finished_on_the_gpu_as_on_the_cpu() -> None:
    random = np.random.default_rng(0)
    chosen = Augmentation(random.integers(0, 10, 6), random.integers(0, 10, 6), random.random(6) < 0.5, np.zeros((6, 3)),
                          random.normal(0, 20, (6, 3)).astype(np.float32))
    pixels = torch.from_numpy(random.integers(0, 256, (6, 3, 67, 67)).astype(np.uint8))
    mean = random.uniform(0, 255, (3, 76, 76)).astype(np.float32)
    for centered in (False, True):
        here = Normalizer(67, Finish(mean, centered), threads=1)
        there = Normalizer(67, Finish(mean, centered), threads=1, device=torch.device("cuda"))
        assert torch.equal(here.begin(list(pixels), chosen)(), there.begin(pixels.cuda(), chosen)().cpu())
        here.close()


@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
@pytest.mark.parametrize("memory", ["ram", "gpu"])
def test_resident_squares_give_the_crops_that_decoding_gives(photos: SampleIndex, stats: Stats, tmp_path: Path, kind: str,
                                                             memory: str) -> None:
    """Both decoded and resized by the GPU; rgb differs by rounding alone, while filling and after."""
    machine = LoaderConfig(resident_memory=memory, resident_folder=str(tmp_path))
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda") as plain, \
            train_loader("resident", photos, "train", SMALL, 8, 1, stats, resident=kind, machine=machine,
                         device="cuda") as resident:
        for _ in range(3):
            for here, there in zip(plain, resident, strict=True):
                assert np.array_equal(here.ids, there.ids) and there.images.device == torch.device("cuda", 0)
                difference = (here.images - there.images).abs()
                assert difference.mean() < (0.01 if kind == "rgb" else FINE_COLOUR)
                assert difference.max() <= 1.01 or kind == "yuv420"


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_graph_finishes_its_pixels_as_the_cpu_does(photos: SampleIndex, stats: Stats, mean: str, channels_last: bool) -> None:
    """To the bit, from the GPU's own uint8 pixels on; in a whole and in a short batch."""
    mean_image = None if mean == "channel" else stats.mean_image_chw
    with train_loader("archives", photos, "train", replace(SMALL, mean=mean), 8, 1, stats) as loader:
        plans = list(read(loader))
        plans[-1] = plans[-1].rows([0, 2, 1])
        settings = replace(loader.context.decoding(loader.context.ids, 8, 67), device_id=0)
        finish = replace(loader.context.finish(mean_image), channels_last=channels_last)
        plain = pixels([unfinished(plan) for plan in plans], settings)
        found = pixels(plans, replace(settings, finish=finish))
        normalizer = loader.context.normalizer(67, mean_image)
        for plan, before, after in zip(plans, plain, found, strict=True):
            assert after.device == torch.device("cuda", 0)
            assert after.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
            expected = normalizer.begin(before.cpu().permute(0, 3, 1, 2), plan.augmentation)()
            assert torch.equal(after.cpu(), expected)
        normalizer.close()


@pytest.mark.parametrize("decode", ["region", "whole"])
@pytest.mark.parametrize("fancy", [True, False])
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_every_way_to_decode_gives_nearly_the_same_pixels(photos: SampleIndex, decode: str, fancy: bool, load: float) -> None:
    """4:2:0. Without interpolated chroma the difference from the CPU is larger, but small on average."""
    if decode == "region" and dali.__cuda_version__ >= 13000:
        pytest.skip("nvImageCodec issue 55: may end the process")
    machine = LoaderConfig(gpu_decode=decode, fancy_upsampling=fancy, hw_decoder_load=load)
    with train_loader("archives", photos, "train", SMALL, 8, 1, compute(photos, "train", 76)) as loader:
        plans, settings = [unfinished(plan) for plan in read(loader)], loader.context.decoding(loader.context.ids, 8, 67)
        gpus = replace(settings, device_id=0, machine=machine)
        for here, there in zip(pixels(plans, settings), pixels(plans, gpus), strict=True):
            difference = (here.float() - there.cpu().float()).abs()
            assert difference.mean() < (MEAN_TOLERANCE if fancy else 3 * MEAN_TOLERANCE)
            assert difference.max() < LARGEST_TOLERANCE or not fancy


@pytest.mark.parametrize("queue", [1, 3])
def test_batches_made_ahead_are_ready_on_the_stream_that_takes_them(photos: SampleIndex, stats: Stats, queue: int) -> None:
    """Read at once on another stream, with memory that is soon used again for the next batches."""
    machine, stream, sums, expected = LoaderConfig(queue=queue), torch.cuda.Stream(), [], []
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda", machine=machine) as loader:
        for _ in range(3):
            for batch in loader:
                torch.cuda.synchronize()
                expected.append((batch.images.double().sum().item(), batch.labels.tolist()))
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda", machine=machine) as loader, \
            torch.cuda.stream(stream):
        for _ in range(3):
            for batch in loader:
                sums.append((batch.images.double().sum(), batch.labels.clone()))
                del batch
    torch.cuda.synchronize()
    assert [(total.item(), labels.tolist()) for total, labels in sums] == expected


def test_no_thread_of_a_loader_waits_for_the_device(photos: SampleIndex, stats: Stats) -> None:
    """As far as torch does the asking; DALI's calls are its own. Crops of evaluations too."""
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda") as loader, \
            eval_loader("archives", photos, "val", replace(SMALL, mean="image_center"), 2, stats, device="cuda") as tests:
        next(loader)
        squares = iter(tests)
        next(squares)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(loader)) == 3
            assert sum(len(list(tests.crops(batch.images, 10))) for batch in squares) == 30
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("memory", ["ram", "gpu"])
@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_resident_batches_wait_for_nothing_and_are_those_of_torch(photos: SampleIndex, stats: Stats, tmp_path: Path, kind: str,
                                                                  memory: str, kernels: str) -> None:
    def taken(kernels: str, mode: str) -> list[torch.Tensor]:
        machine = LoaderConfig(resident_folder=str(tmp_path), resident_memory=memory, kernels=kernels)
        with train_loader("resident", photos, "train", SMALL, 8, 1, stats, resident=kind, machine=machine,
                          device="cuda") as loader:
            loader.fill()
            next(loader)
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return [batch.images for batch in loader]
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for ours, plain in zip(taken(kernels, "error"), taken("torch", "default"), strict=True):
        assert torch.equal(ours, plain)


def test_small_arrays_travel_in_one_pinned_block() -> None:
    random, device = np.random.default_rng(0), torch.device("cuda", 0)
    for _ in range(50):  # blocks are used again
        arrays = [random.integers(0, 1000, 256), random.random(256) < 0.5, random.normal(size=(256, 3)).astype(np.float32)]
        found = to_device(device, *arrays)
        assert all(np.array_equal(tensor.cpu().numpy(), array) for tensor, array in zip(found, arrays, strict=True))


def test_waiting_is_counted_on_the_devices_clock(photos: SampleIndex, stats: Stats) -> None:
    with train_loader("archives", photos, "train", SMALL, 8, 1, stats, device="cuda") as loader:
        count = len(list(loader))
        torch.cuda.synchronize()
        waits = loader.monitor.waits
    assert waits.batches == count and waits.seconds > 0
    assert waits.read + waits.decode + waits.normalize + waits.copy == pytest.approx(waits.seconds, rel=1e-6)


def test_packed_images_decode_on_the_gpu(photos: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    from tools import pack_shards
    assert pack_shards.main([str(photos.path), str(tmp_path / "packed"), "--square-px", "76", "--jobs", "1"]) == 0
    packed = SampleIndex.load(tmp_path / "packed")
    with train_loader("packed", packed, "train", SMALL, 8, 1, stats) as cpu, \
            train_loader("packed", packed, "train", SMALL, 8, 1, stats, device="cuda") as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            difference = (here.images - there.images.cpu()).abs()
            assert difference.mean() < MEAN_TOLERANCE and difference.max() < LARGEST_TOLERANCE
