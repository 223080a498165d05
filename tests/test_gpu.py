"""What only a GPU can show. Run with `pytest -m gpu`; deselected by default."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.small_set import photographs, write_set

from model.alexnet import AlexNet
from model.config import LrnConfig, ModelConfig
from model.lrn import local_response_norm
from pipeline.colour import Colour, Finish
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index import SampleIndex
from pipeline.loader import TrainLoader
from pipeline.reader import Quarantine
from pipeline.squares import TestLoader
from pipeline.stats import Stats, compute
from pipeline.tiers import train_loader
from train.recipe import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
NETWORK = ModelConfig(input_px=67, classes=10, channels=(16, 32, 48, 48, 32), hidden=(64, 64), towers=2, dropout=0.5,
                      lrn=LrnConfig(2.0, 5, 1e-4, 0.75), init_std=(0.01,) * 8, init_bias=(0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0))
# nvJPEG's inverse DCT and chroma upsampling round otherwise than libjpeg-turbo's: a grey level nearly everywhere, more at
# sharp colour edges; and DALI's resize repeats the image's outermost pixels where the CPU's shortens the filter.
MEAN_TOLERANCE, LARGEST_TOLERANCE = 1.0, 24.0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("gpu"), photographs(32), photographs(40)[32:])


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> Stats:
    return compute(photos, "train", 76)


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_crops_decoded_on_the_gpu_equal_the_cpus(photos: SampleIndex, stats: Stats, mean: str) -> None:
    data = DataConfig("square", 76, 67, True, 0.1, mean)
    with TrainLoader(photos, "train", data, 8, 1, stats) as cpu, \
            TrainLoader(photos, "train", data, 8, 1, stats, device_id=0) as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            assert there.images.device == torch.device("cuda", 0) and there.labels.device == there.images.device
            assert np.array_equal(here.ids, there.ids) and torch.equal(here.labels, there.labels.cpu())
            difference = (here.images - there.images.cpu()).abs()
            assert difference.mean() < MEAN_TOLERANCE and difference.max() < LARGEST_TOLERANCE


def test_test_squares_decoded_on_the_gpu_equal_the_cpus(photos: SampleIndex, stats: Stats) -> None:
    with TestLoader(photos, "val", SMALL, 3, stats) as cpu, TestLoader(photos, "val", SMALL, 3, stats, device_id=0) as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            assert (here.images - there.images.cpu()).abs().mean() < MEAN_TOLERANCE


def test_batches_held_while_others_are_made_keep_their_pixels(photos: SampleIndex, stats: Stats) -> None:
    with TrainLoader(photos, "train", SMALL, 8, 1, stats, device_id=0, machine=LoaderConfig(prefetch=3)) as loader:
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
    with TrainLoader(index, "train", SMALL, 4, 1, stats, device_id=0, quarantine=Quarantine(1)) as loader:
        ids = np.concatenate([batch.ids for batch in loader])
    assert len(ids) == 16 and 5 not in ids


def test_images_are_finished_on_the_gpu_as_on_the_cpu() -> None:
    random = np.random.default_rng(0)
    places = [random.integers(0, 10, 6) for _ in range(4)]
    finish = Finish(places[0], places[1], random.random(6) < 0.5, places[2], places[3], random.random(6) < 0.5,
                    random.normal(0, 20, (6, 3)).astype(np.float32))
    pixels = torch.from_numpy(random.integers(0, 256, (6, 3, 76, 76)).astype(np.uint8))
    mean = random.uniform(0, 255, (3, 76, 76)).astype(np.float32)
    here = Colour(67, mean, threads=1)
    there = Colour(67, mean, threads=1, device=torch.device("cuda"))
    assert torch.equal(here(list(pixels), finish), there.whole(pixels.cuda(), finish).cpu())
    here.close()


@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
@pytest.mark.parametrize("memory", ["ram", "gpu"])
def test_resident_squares_give_the_crops_that_decoding_gives(photos: SampleIndex, stats: Stats, tmp_path: Path, kind: str,
                                                             memory: str) -> None:
    """Both decoded and resized by the GPU; rgb differs by rounding alone, while filling and after."""
    machine = LoaderConfig(resident_memory=memory, resident_folder=str(tmp_path))
    with TrainLoader(photos, "train", SMALL, 8, 1, stats, device_id=0) as plain, \
            train_loader("resident", photos, "train", SMALL, 8, 1, stats, resident=kind, machine=machine,
                         device_id=0) as resident:
        for _ in range(3):
            for here, there in zip(plain, resident, strict=True):
                assert np.array_equal(here.ids, there.ids) and there.images.device == torch.device("cuda", 0)
                difference = (here.images - there.images).abs()
                assert difference.mean() < (0.01 if kind == "rgb" else 3)
                assert difference.max() <= 1.01 or kind == "yuv420"


def test_waiting_is_counted_on_the_devices_clock(photos: SampleIndex, stats: Stats) -> None:
    with TrainLoader(photos, "train", SMALL, 8, 1, stats, device_id=0) as loader:
        count = len(list(loader))
        torch.cuda.synchronize()
        waits = loader.meter.waits
    assert waits.batches == count and waits.seconds > 0
    assert waits.read + waits.decode + waits.colour + waits.copy == pytest.approx(waits.seconds, rel=1e-6)


def test_packed_images_decode_on_the_gpu(photos: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    from tools import pack_shards
    assert pack_shards.main([str(photos.path), str(tmp_path / "packed"), "--square-px", "76", "--jobs", "1"]) == 0
    packed = SampleIndex.load(tmp_path / "packed")
    with TrainLoader(packed, "train", SMALL, 8, 1, stats) as cpu, \
            TrainLoader(packed, "train", SMALL, 8, 1, stats, device_id=0) as gpu:
        for here, there in zip(cpu, gpu, strict=True):
            difference = (here.images - there.images.cpu()).abs()
            assert difference.mean() < MEAN_TOLERANCE and difference.max() < LARGEST_TOLERANCE


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_response_normalisation_equals_the_cpus(layout: torch.memory_format) -> None:
    lrn = LrnConfig(2.0, 5, 1e-4, 0.75)
    x = torch.randn(4, 32, 15, 15).mul_(50).contiguous(memory_format=layout)
    results = []
    for device in ("cpu", "cuda"):
        there = x.to(device).requires_grad_()
        y = local_response_norm(there, lrn, groups=2, relu=True)
        y.backward(torch.ones_like(y))
        assert there.grad is not None
        results.append((y.detach().cpu(), there.grad.cpu()))
    for here, there in zip(*results, strict=True):
        assert torch.allclose(here, there, rtol=1e-5, atol=1e-4)


def test_a_training_step_equals_the_cpus(photos: SampleIndex, stats: Stats) -> None:
    """Same initial values, same dropout masks: logits and gradients differ by rounding only (TF32 off)."""
    with TrainLoader(photos, "train", SMALL, 8, 1, stats) as loader:
        batch = next(iter(loader))
    found = []
    for device in ("cpu", "cuda"):
        network = AlexNet(NETWORK, seed=3).to(device, torch.float64)
        logits = network(batch.images.to(device, torch.float64), step=5)
        torch.nn.functional.cross_entropy(logits, batch.labels.to(device)).backward()
        found.append([logits.detach().cpu()] + [p.grad.cpu() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == 17
    for here, there in zip(*found, strict=True):
        # LRN and dropout hash are the same arithmetic; sums are in another order
        assert torch.allclose(here, there, rtol=1e-6, atol=1e-9)


def test_the_demo_recipe_trains_on_the_gpu(tmp_path: Path) -> None:
    """Commands as a user types them; bf16 and channels_last too. `parse` shows that the recipe knows these settings."""
    root = Path(__file__).resolve().parent.parent
    recipe = root / "train/recipes/demo.yaml"
    assert parse(["--config", str(recipe), "--machine.device=cuda"]).config.machine.device == "cuda"
    index = write_set(tmp_path / "set", photographs(64), photographs(72)[64:], classes=10)
    compute(index, "train", 76).save(index.path / "stats-train-76.npz")
    for name, more in (("plain", []), ("fast", ["--machine.precision=bf16", "--machine.channels_last=true"])):
        command = [sys.executable, "-m", "train.main", "--config", str(recipe), f"--data.index={index.path}",
                   "--machine.device=cuda", f"--machine.runs={tmp_path}", f"--machine.name={name}", "--train.epochs=1",
                   "--train.batch=16", "--schedule.milestones=[]", *more]
        done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_two_gpus_share_a_run_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's own limit, 1e-5, on losses in float32; NCCL, a GPU a process."""
    from tests.recipes import write_recipe
    from tools import same_losses

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL allows one process each")
    index = write_set(tmp_path / "set", photographs(76), photographs(84)[76:], classes=6)
    compute(index, "train", 76).save(index.path / "stats-train-76.npz")
    ways = [way.name for way in same_losses.WAYS.values() if way.processes <= torch.cuda.device_count()]
    code = same_losses.main(["--config", str(write_recipe(tmp_path, index.path)), "--steps", "12", "--json", "--ways", *ways,
                             "--machine.device=cuda"])
    assert code == 0, capsys.readouterr().err
