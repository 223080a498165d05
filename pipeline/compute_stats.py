"""Computes `Stats` of a split: one pass through the training's own decode and resize, exact.

All sums are integers of uint8 pixels, so they do not depend on the order of the images. S: side of the central square; pixel
values 0–255.
"""
import contextlib
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig, LoaderConfig
from pipeline.files import locked_folder
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import square_loader
from pipeline.process_pool import Progress
from pipeline.reading.quarantine import quarantine_budget
from pipeline.stats import NoStats, Stats, stats_path


def compute(index: SampleIndex, split: str, square_px: int, *, machine: LoaderConfig = LoaderConfig(), batch: int = 64,
            device_id: int | None = None, progress: Progress = Progress(), out: Path | None = None) -> Stats:
    """Statistics of a split's central squares of side `square_px`, decoded `batch` images at a time.

    Unreadable samples are skipped and listed. `out`: a file to write the statistics to. Raises RuntimeError when more are
    unreadable than `machine.quarantine_budget` permits, or all.
    """
    sizes = index.samples["size"][index.ids(split)].astype(np.int64)
    image, count = np.zeros((square_px, square_px, 3), np.int64), 0  # sum of the squares, and of how many
    product = np.zeros((3, 3), np.int64)  # sum over their pixels of channel × channel
    config = DataConfig(region="square", square_px=square_px, crop_px=square_px, mirror=False, lighting=0, mean="channel")
    budget = quarantine_budget(machine, len(sizes))
    progress.expect("statistics", int(sizes.sum()))
    with square_loader(index, split, config, batch, None, machine=machine, device_id=device_id, skip_corrupt=True) as loader:
        for loaded in loader:
            pixels = loaded.images.cpu().numpy()
            image += pixels.sum(axis=0, dtype=np.int64)
            for each in pixels:
                flat = each.reshape(-1, 3).astype(np.float64)  # exact below 2^53: 65,536 pixels of 255² are 2^32
                product += (flat.T @ flat).astype(np.int64)
            count += len(pixels)
            if len(loader.skipped) > budget:
                id, why = next(iter(loader.skipped.items()))
                raise RuntimeError(f"unreadable samples (={len(loader.skipped)} of {len(sizes)}) must not exceed the budget "
                                   f"(={budget}); the first: {index.safe_name(id)} {why}; run `alexnet index verify "
                                   f"{index.path} --scrub --exclude`")
            progress.advance(len(pixels), int(sizes[loaded.step * batch:(loaded.step + 1) * batch].sum()))
        skipped = dict(loader.skipped)
    if count == 0:
        raise RuntimeError(f"split (={split}) of {index.path} must have a readable image; all {len(skipped)} failed")
    mean = image.sum(axis=(0, 1)) / (count * square_px ** 2)
    values, vectors = np.linalg.eigh(product / (count * square_px ** 2) - np.outer(mean, mean))
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), range(3)])  # a sign eigh leaves open
    stats = Stats((image / count).astype(np.float32), mean.astype(np.float32), values, vectors, count, skipped,
                  index.split_sha256(split), split)
    if out is not None:
        stats.save(out)
    return stats


def find_or_compute(index: SampleIndex, square_px: int, split: str = "train", *, machine: LoaderConfig = LoaderConfig(),
                    progress: Progress = Progress()) -> Stats:
    """The statistics of a split that lie beside its index; when there are none of these images, `compute` them and store them
    there: on the CPU, whose pixels are the same everywhere, and of several processes by one, while the others wait. Raises as
    `compute`, and ValueError when those there are damaged; OSError when the folder cannot be written."""
    with contextlib.suppress(NoStats):
        return Stats.for_index(index, square_px, split)
    with locked_folder(index.path):
        with contextlib.suppress(NoStats):  # another process may have computed them meanwhile
            return Stats.for_index(index, square_px, split)
        return compute(index, split, square_px, machine=machine, progress=progress,
                       out=stats_path(index.path, square_px, split))
