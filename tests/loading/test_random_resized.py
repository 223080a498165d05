"""Crops of random boxes, mean and std, and types of output: pixels in every tier against PIL, order, resume, layouts, errors."""
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.helpers.decoded import pixels, read
from tests.helpers.packed_set import write_packed
from tests.helpers.small_set import encode, photographs, picture, write_set

from pipeline.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.decoding.resize import resize_boxes
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.eval_loader import EvalLoader
from pipeline.loading.train_loader import TrainLoader
from pipeline.stats import Stats
from pipeline.tiers import make_eval_loader, make_train_loader

# uint8: the pixels alone. Squares of 76 px as in the shared sets.
BOXES = DataConfig.preset("imagenet", square_px=76, crop_px=67, output="uint8")
SQUARE = replace(BOXES, region="square")
FLOATS = replace(SQUARE, output="float32")
Source = Callable[[int], np.ndarray]  # id → the (H, W, 3) image that boxes are taken of


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """With images as wide as 5:1, and smaller than their crops."""
    blobs = [*photographs(20), *(encode(picture(i, *size)) for i, size in enumerate([(40, 200), (300, 60), (30, 31)], 20))]
    return write_set(tmp_path_factory.mktemp("photos"), blobs, photographs(27)[20:])


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_packed(tmp_path_factory.mktemp("squares"), [encode(picture(i, 76, 76)) for i in range(30)], 9)


def loader(tier: str, index: SampleIndex, data: DataConfig, folder: Path, batch: int = 6, *, threads: int = 2,
           memory: str = "ram", **options: Any) -> TrainLoader:
    machine = {name: options.pop(name) for name in ("channels_last", "kernels") if name in options}
    settings = LoaderConfig(threads=threads, resident_folder=str(folder), resident_memory=memory, **machine)
    return make_train_loader(index, "train", batch, data=data, tier=tier, seed=7, machine=settings, return_batch=True, **options)


def squares_of(tier: str, index: SampleIndex, split: str, data: DataConfig, folder: Path, resident: str = "rgb", *,
               keep: bool = True, **machine: Any) -> EvalLoader:
    return make_eval_loader(index, split, 3, data=data, tier=tier, return_batch=True, resident=resident, keep=keep,
                            machine=LoaderConfig(resident_folder=str(folder), **machine))


def decoded(index: SampleIndex) -> Source:
    return lambda id: np.asarray(Image.open(io.BytesIO(index.read(id))).convert("RGB"))


def kept(index: SampleIndex, folder: Path, kind: str) -> Source:
    """The squares of tier resident, as evaluations show them."""
    raw = replace(SQUARE, crop="random")
    with squares_of("resident", index, "train", raw, folder, kind, keep=False) as squares:
        found = {int(id): image.permute(1, 2, 0).numpy().copy() for batch in squares
                 for id, image in zip(batch.ids, batch.images)}
    return found.__getitem__


def expected(source: np.ndarray, data: DataConfig, top: int, left: int, box: np.ndarray, mirror: bool) -> np.ndarray:
    """(67, 67, 3) uint8 by PIL, as torchvision's resized_crop has it: the box is cut, then resized."""
    size, scale = np.array([source.shape[:2]]), np.ones(2)
    first = np.zeros(2)
    if data.region == "square":  # boxes of a square are drawn in pixels of the resized one
        resized = geometry.resized(size, data.square_px)
        scale, first = (size / resized)[0], geometry.central(resized, data.square_px)[0]
    low = np.rint((first + [top, left]) * scale).astype(int)
    high = np.rint((first + [top, left] + box) * scale).astype(int)
    cut = Image.fromarray(source).crop((*low[::-1].tolist(), *high[::-1].tolist()))
    resized_box = np.asarray(cut.resize((data.crop_px, data.crop_px), Image.Resampling.BILINEAR))
    return resized_box[:, ::-1] if mirror else resized_box


def check(train: TrainLoader, source: Source, data: DataConfig, largest: int = 2, mean: float = 0.25) -> None:
    """Every image of an epoch is the one that PIL makes, but for rounding: of some sizes the two round in another order."""
    sizes, mirrored = set(), set()
    with train:
        for batch in train:
            drawn = train.planner.augmentation(batch.ids, batch.epochs)
            assert drawn.box is not None
            for row, id in enumerate(batch.ids.tolist()):
                mirror = bool(drawn.mirror[row])
                wanted = expected(source(id), data, int(drawn.top[row]), int(drawn.left[row]), drawn.box[row], mirror)
                difference = np.abs(batch.images[row].permute(1, 2, 0).numpy().astype(int) - wanted)
                assert difference.max() <= largest and difference.mean() < mean, (id, difference.max(), difference.mean())
                sizes.add(tuple(drawn.box[row].tolist()))
                mirrored.add(mirror)
    assert len(sizes) > 10 and mirrored == {False, True}


@pytest.mark.parametrize("data", [BOXES, SQUARE], ids=["full", "square"])
def test_archives(photos: SampleIndex, tmp_path: Path, data: DataConfig) -> None:
    check(loader("archives", photos, data, tmp_path), decoded(photos), data)


def test_inside_a_crop_pixels_are_those_of_pils_box(photos: SampleIndex, tmp_path: Path) -> None:
    """`resize(box=…)` sees beyond the box, where a box cut first has an edge: so all but the outermost pixels."""
    data = replace(BOXES, mirror=False)
    with loader("archives", photos, data, tmp_path) as train:
        batch = next(iter(train))
        drawn = train.planner.augmentation(batch.ids, batch.epochs)
        assert drawn.box is not None
        for row, id in enumerate(batch.ids.tolist()):
            (height, width), top, left = drawn.box[row].tolist(), int(drawn.top[row]), int(drawn.left[row])
            image = Image.open(io.BytesIO(photos.read(id))).convert("RGB")
            wanted = np.asarray(image.resize((67, 67), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)))
            edge = 2 if min(height, width) > 67 else 1 + 67 // min(height, width)  # enlarged, a source pixel is several
            inside = np.s_[edge:-edge, edge:-edge]
            assert np.abs(batch.images[row].permute(1, 2, 0).numpy()[inside].astype(int) - wanted[inside]).max() <= 2


@pytest.mark.parametrize("tier", ["packed", "streamed"])
def test_packed(squares: SampleIndex, tmp_path: Path, tier: str) -> None:
    options: dict[str, Any] = {"window": 14, "lanes": 2} if tier == "streamed" else {}
    check(loader(tier, squares, SQUARE, tmp_path, **options), decoded(squares), SQUARE)
    with loader(tier, squares, SQUARE, tmp_path, **options) as one, loader(tier, squares, BOXES, tmp_path, **options) as other:
        assert torch.equal(next(one).images, next(other).images)  # the whole image is the square


@pytest.mark.parametrize("memory,kernels", [("ram", "auto"), ("ram", "triton"), ("gpu", "auto")])
@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_resident(photos: SampleIndex, tmp_path: Path, kind: str, memory: str, kernels: str) -> None:
    """In the first epoch, while the store is filled; and after. Of yuv420 the squares are those that its 4:2:0 gives back."""
    with loader("resident", photos, SQUARE, tmp_path, resident=kind, memory=memory, kernels=kernels) as train:
        list(train)
        check(train, kept(photos, tmp_path, kind), SQUARE)
        assert train.epoch == 2


def test_the_boxes_of_squares_are_the_same_in_all_tiers(photos: SampleIndex, tmp_path: Path) -> None:
    with loader("archives", photos, SQUARE, tmp_path) as one, loader("resident", photos, SQUARE, tmp_path) as other:
        for ours, theirs in zip(one, other, strict=True):
            drawn, again = (train.planner.augmentation(batch.ids, batch.epochs).box
                            for train, batch in ((one, ours), (other, theirs)))
            assert np.array_equal(ours.ids, theirs.ids) and drawn is not None and np.array_equal(drawn, again)
            assert (ours.images.float() - theirs.images.float()).abs().mean() < 8  # of the original, and of its small square


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(np.array_equal(a.ids, b.ids) and torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tier,memory", [("archives", "ram"), ("streamed", "ram"), ("resident", "ram"), ("resident", "gpu")])
def test_resume_at_every_step_and_any_number_of_threads_and_ranks(photos: SampleIndex, squares: SampleIndex, tmp_path: Path,
                                                                  tier: str, memory: str) -> None:
    index = squares if tier == "streamed" else photos
    options: dict[str, Any] = {"window": 14, "lanes": 2} if tier == "streamed" else {}
    with loader(tier, index, FLOATS, tmp_path, memory=memory, **options) as train:
        whole = [batch for _ in range(2) for batch in train]
    for threads, step in ((1, 1), (3, 4)):
        with loader(tier, index, FLOATS, tmp_path, threads=threads, memory=memory, **options) as resumed:
            resumed.load_state_dict({**resumed.state_dict(), "step": step})
            rest = [batch for _ in range(2 - resumed.epoch) for batch in resumed]
        assert same(rest, whole[step:])
    ranks = []
    for rank in range(2):
        with loader(tier, index, FLOATS, tmp_path, memory=memory, shard=(rank, 2), **options) as train:
            ranks.append(list(train))
    for one, other, both in zip(*ranks, whole):
        assert torch.equal(torch.cat([one.images, other.images]), both.images)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("tier,kernels", [("archives", "auto"), ("resident", "auto"), ("resident", "triton")])
def test_mean_std_type_and_layout(photos: SampleIndex, tmp_path: Path, tier: str, kernels: str, output: str,
                                  channels_last: bool) -> None:
    """(pixel / 255 - mean) / std, rounded to the type wanted; evaluations the same."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    data, layout = replace(SQUARE, output=output), torch.channels_last if channels_last else torch.contiguous_format
    with loader(tier, photos, SQUARE, tmp_path) as plain, \
            loader(tier, photos, data, tmp_path, channels_last=channels_last, kernels=kernels) as train, \
            squares_of(tier, photos, "val", SQUARE, tmp_path) as squares, \
            squares_of(tier, photos, "val", data, tmp_path, kernels=kernels, channels_last=channels_last) as test:
        for before, after in [*zip(plain, train, strict=True), *zip(squares, test, strict=True)]:
            assert before.images.dtype == torch.uint8 and after.images.dtype == getattr(torch, output)
            assert after.images.is_contiguous(memory_format=layout) and np.array_equal(before.ids, after.ids)
            wanted = before.images if output == "uint8" else (before.images / 255 - mean) / std
            tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "uint8": 0}[output]
            if kernels == "triton":  # boxes are resized by products of matrices
                tolerance += 2 if output == "uint8" else 2 / 255 / 0.22
            assert torch.allclose(after.images.float(), wanted.float(), rtol=0, atol=tolerance)
        assert next(test.crops(after.images, 1)).shape == (1, 3, 67, 67)


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
def test_the_papers_crops_in_other_types_and_layouts(photos: SampleIndex, tmp_path: Path, mean: str) -> None:
    random = np.random.default_rng(0)
    image = random.uniform(0, 255, (76, 76, 3)).astype(np.float32)
    stats = Stats(image, image.mean((0, 1)), np.array([900.0, 90.0, 9.0]), np.eye(3), 1, {}, "", "train")
    data = DataConfig(square_px=76, crop_px=67, mean=mean)
    with loader("archives", photos, data, tmp_path, stats=stats) as plain:
        batches = list(plain)
    for output in ("float32", "float16", "bfloat16"):
        with loader("archives", photos, replace(data, output=output), tmp_path, stats=stats, channels_last=True) as train:
            for before, after in zip(batches, train, strict=True):
                assert torch.equal(before.images.to(after.images.dtype), after.images)
                assert after.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decode", ["region", "whole"])
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16", "uint8"])
def test_the_gpus_graph_run_on_the_cpu(photos: SampleIndex, tmp_path: Path, decode: str, output: str) -> None:
    """Within two grey levels inside; at the edges its filter repeats a box's outermost pixels where torch's is shortened."""
    data = replace(BOXES, output=output)
    with loader("archives", photos, data, tmp_path) as train:
        plans, expected_images = list(read(train)), [batch.images.float() for batch in train]
        context, settings = train.context, train.chain.settings  # type: ignore[attr-defined]
        machine = replace(settings.machine, gpu_decode=decode)
        found = pixels(plans, replace(settings, machine=machine, finish=replace(context.finish(None), channels_last=True)))
    level = 1 if output == "uint8" else 1 / 255 / 0.224
    for ours, theirs in zip(found, expected_images, strict=True):
        assert ours.dtype == getattr(torch, output) and ours.is_contiguous(memory_format=torch.channels_last)
        difference = (ours.float() - theirs).abs() / level
        assert difference.mean() < 0.5 and difference[..., 3:-3, 3:-3].max() < 3 and difference.max() < 30


def test_boxes_by_matrices_are_those_of_the_cpu() -> None:
    random = np.random.default_rng(0)
    squares = torch.from_numpy(random.integers(0, 256, (7, 3, 50, 60)).astype(np.uint8))
    sizes = np.array([[50, 60], [1, 1], [20, 20], [9, 47], [50, 3], [20, 60], [37, 41]])
    top, left = ((random.random(7) * (extent - sizes[:, axis] + 1)).astype(int) for axis, extent in enumerate((50, 60)))
    found = resize_boxes(squares, *map(torch.from_numpy, (top, left, sizes)), 20)
    for image, square, y, x, (height, width) in zip(found, squares, top, left, sizes.tolist(), strict=True):
        cut = Image.fromarray(square.permute(1, 2, 0).numpy()).crop((x, y, x + width, y + height))
        wanted = np.asarray(cut.resize((20, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(image.numpy().astype(int) - wanted).max() <= 1


def test_presets() -> None:
    assert DataConfig.preset("alexnet") == DataConfig() == DataConfig("square", 256, 227, True, 0.1, "image")
    assert DataConfig().needs_stats and DataConfig().factor is None
    imagenet = DataConfig.preset("imagenet", crop_px=192)
    assert (imagenet.crop_px, imagenet.square_px, imagenet.crop, imagenet.lighting) == (192, 256, "random_resized", 0)
    assert imagenet.mean == (0.485, 0.456, 0.406) and imagenet.std == (0.229, 0.224, 0.225) and not imagenet.needs_stats
    assert hash(DataConfig.preset("imagenet", scale=[0.2, 1])) and DataConfig.preset("imagenet", scale=[0.2, 1]).scale == (0.2, 1)


@pytest.mark.parametrize("changes,message", [
    ({"crop": "center"}, r"data.crop \(=center\) must be one of random, random_resized; "),
    ({"crop": "random_resized"}, r"data.mean \(=image\) must not be image where data.crop is random_resized: .*; use mean:"),
    ({"scale": (0.0, 1.0)}, r"data.scale \(=\[0.0, 1.0\]\) must be two numbers, smallest and largest, .* at most 1; "),
    ({"scale": (0.9, 0.2)}, "data.scale"), ({"scale": (0.1, 1.5)}, "data.scale"), ({"ratio": (1.0,)}, "data.ratio"),
    ({"mean": (0.5, 0.5)}, r"data.mean \(=\(0.5, 0.5\)\) must be one of image, image_center, channel, or three numbers in"),
    ({"mean": (124, 116, 104)}, "data.mean .* three numbers in .0, 1., shares of 255"),
    ({"mean": IMAGENET_MEAN}, r"data.std \(=\[\]\) must be three numbers in \(0, 1\]"),
    ({"std": IMAGENET_STD}, r"data.std \(=.*\) must be empty where data.mean is image; or give three numbers as data.mean"),
    ({"mean": IMAGENET_MEAN, "std": (0.2, 0.2, 0)}, "data.std"), ({"output": "int8"}, r"data.output \(=int8\) must be one of"),
    ({"output": "uint8"}, r"data.lighting \(=0.1\) must be 0 where data.output is uint8"),
])
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_what_a_loader_refuses(photos: SampleIndex, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset \(=resnet\) must be one of alexnet, imagenet"):
        DataConfig.preset("resnet")
    with pytest.raises(ValueError, match=r"data.region \(=full\) must be square for tier resident, .*; set data.region: square"):
        loader("resident", photos, BOXES, tmp_path)
