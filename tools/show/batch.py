"""A sheet of training crops: what the network sees, with the mean added back, and how each crop was augmented.

Every crop carries its class, sample id and epoch, offset in its region, horizontal flip, and PCA colour jitter in grey levels,
which stays in. B crops, H rows, W columns.
"""
import argparse
import tempfile
from dataclasses import replace

import numpy as np

from pipeline.compute_stats import find_or_compute
from pipeline.config import DataConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.sampling.augment import Augmentation, lighting_shift
from pipeline.stats import Stats, channel_mean, mean_image
from pipeline.tiers import make_train_loader
from tools.cli import ProgressBar
from tools.show.sheet import Sheet
from train.recipe import parse

_COLUMNS = 8
_CELL, _SIDE = (2.1, 2.6), 1.94  # inches: of a crop with its text; of the crop


def restore(batch: Batch, augmentation: Augmentation, data: DataConfig, stats: Stats) -> np.ndarray:
    """The crops of a batch with the subtracted mean added back, (B, H, W, 3) uint8."""
    crops = batch.images.float().cpu().numpy().transpose(0, 2, 3, 1).copy()
    px, image = data.crop_px, mean_image(data, stats) is not None
    if data.factor is not None:
        crops /= np.array(data.factor, np.float32)
    if (mean := channel_mean(data, stats)) is not None:
        crops += mean
    for row, crop in enumerate(crops) if image else ():
        top, left, flip = int(augmentation.top[row]), int(augmentation.left[row]), bool(augmentation.mirror[row])
        if data.mean == "image_center":
            top = left = (data.square_px - px) // 2
            flip = False
        mean = stats.mean_image[top:top + px, left:left + px]
        crop += mean[:, ::-1] if flip else mean
    return np.clip(crops + 0.5, 0, 255).astype(np.uint8)


def captions(index: SampleIndex, batch: Batch, augmentation: Augmentation, stats: Stats) -> list[str]:
    """Four lines for each crop: class; id and epoch; offset and flip; colour jitter."""
    shifts = lighting_shift(augmentation.alphas, stats.eigenvalues, stats.eigenvectors)
    texts = []
    for row, id in enumerate(batch.ids):
        label = index.classes[int(batch.labels[row])]
        words = label.words.split(",")[0][:22] or label.wnid
        jitter = " ".join(f"{channel}{value:+.0f}" for channel, value in zip("RGB", shifts[row]))
        size = "" if augmentation.box is None else "{} × {} ".format(*augmentation.box[row])
        texts.append(f"{words}\nid {id}, epoch {batch.epochs[row]}\n{size}at {augmentation.top[row]}, {augmentation.left[row]}"
                     f"{' flipped' if augmentation.mirror[row] else ''}\n{jitter}")
    return texts


def draw(crops: np.ndarray, texts: list[str], title: str) -> Sheet:
    """Lay out crops (B, H, W, 3) uint8, eight in a row, each over its text."""
    columns = min(_COLUMNS, len(crops))
    sheet = Sheet(title, columns * _CELL[0], -(-len(crops) // columns) * _CELL[1])
    for number, (crop, text) in enumerate(zip(crops, texts)):
        left, top = number % columns * _CELL[0] + 0.08, number // columns * _CELL[1]
        sheet.image(crop, left, top, _SIDE)
        for line, words in enumerate(text.split("\n"), 1):
            sheet.text(words, left + _SIDE / 2, top + _SIDE + 0.02 + 0.13 * line, 7, _SIDE)
    return sheet


def run(args: argparse.Namespace) -> None:
    """Load one batch and draw it. Raises ValueError or RuntimeError."""
    if not 1 <= args.count <= 200:
        raise ValueError(f"--count (={args.count}) must lie in 1..200; larger sheets cannot be read")
    if args.step < 0:
        raise ValueError(f"--step (={args.step}) must be at least 0; batches are counted from 0")
    config = parse([str(args.recipe), *([f"--data.index={args.index}", "--data.packed="] if args.index else [])]).config
    data = replace(config.data, index=str(config.data.images), packed="")
    archives = str(args.archives or config.machine.archives)
    store = archives if archives.startswith("s3://") else ""
    index = SampleIndex.load(data.index, None if store else archives or None)
    if args.count > (samples := len(index.ids(data.train_split))):
        raise ValueError(f"--count (={args.count}) must not exceed the {samples} images of split {data.train_split}; lower it")
    with ProgressBar() as progress:
        stats = find_or_compute(index, data.square_px, data.train_split, progress=progress)
    with tempfile.TemporaryDirectory() as scratch:  # tier resident would begin to fill its file: not for a sheet
        machine = replace(config.machine, threads=0, resident_memory="ram", resident_folder=scratch)
        with make_train_loader(index, data.train_split, args.count, data=data, tier=data.tier, seed=config.train.seed,
                               stats=stats, store=store, resident=data.resident, window=data.window, lanes=data.lanes,
                               machine=machine, return_batch=True) as loader:
            loader.load_state_dict({**loader.state_dict(), "step": args.step})
            batch = next(iter(loader))
            augmentation = loader.planner.augmentation(batch.ids, batch.epochs)
    first = args.step * args.count
    title = (f"{index.path}, tier {data.tier}, training crops {first} to {first + args.count - 1}: {data.crop_px} of "
             f"{data.square_px} px, crop {data.crop}, region {data.region}, mean {data.mean}, lighting {data.lighting:g}")
    texts = captions(index, batch, augmentation, stats)
    draw(restore(batch, augmentation, loader.data, stats), texts, title).save(args.out)
    print(f"{len(batch.ids)} crops in {args.out}")
