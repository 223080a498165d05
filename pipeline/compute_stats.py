"""Computes `Stats` of a split: one pass through the training's own decode and resize, exact and resumable.

All sums are integers of uint8 pixels, so they do not depend on the order of the images, and an interrupted and resumed pass gives
the same bits. S: side of the central square; pixel values 0–255.
"""
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig, LoaderConfig
from pipeline.files import locked_folder
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import square_loader
from pipeline.process_pool import Progress
from pipeline.reading.quarantine import quarantine_budget
from pipeline.schema import Count
from pipeline.stats import IdText, NoStats, Stats, load_arrays, save_arrays, skipped_ids, stats_path


def compute(index: SampleIndex, split: str, square_px: int, *, machine: LoaderConfig = LoaderConfig(), batch: int = 64,
            device_id: int | None = None, progress: Progress = Progress(), save_s: float = 30.0,
            out: Path | None = None) -> Stats:
    """Statistics of a split's central squares of side `square_px`, decoded `batch` images at a time.

    Unreadable samples are skipped and listed. The pass is saved every `save_s` seconds (``stats-<split>-<S>.partial.npz`` beside
    the index), and resumes there; `out`: a file to write the statistics to before that is removed. Raises RuntimeError when more
    are unreadable than `machine.quarantine_budget` permits, or all.
    """
    sizes = index.samples["size"][index.ids(split)].astype(np.int64)
    partial = stats_path(index.path, square_px, split).with_suffix(".partial.npz")
    about = {"index": index.split_sha256(split), "split": split, "batch": batch}
    sums = _Sums.resume(partial, about, square_px)
    config = DataConfig(region="square", square_px=square_px, crop_px=square_px, mirror=False, lighting=0, mean="channel")
    budget = quarantine_budget(machine, len(sizes))
    progress.expect("statistics", int(sizes[sums.next_batch * batch:].sum()))
    saved = time.monotonic()
    with square_loader(index, split, config, batch, None, machine=machine, device_id=device_id, skip_corrupt=True,
                       first=sums.next_batch) as loader:
        for loaded in loader:
            sums.add(loaded.images.cpu().numpy(), loaded.step)
            skipped = sums.skipped | loader.skipped
            if len(skipped) > budget:
                id, why = next(iter(skipped.items()))
                raise RuntimeError(f"unreadable samples (={len(skipped)} of {len(sizes)}) must not exceed the budget (={budget})"
                                   f"; the first: {index.safe_name(id)} {why}; run `alexnet index verify "
                                   f"{index.path} --scrub --exclude`")
            progress.advance(len(loaded.images), int(sizes[loaded.step * batch:(loaded.step + 1) * batch].sum()))
            if time.monotonic() - saved > save_s:
                save_arrays(partial, {"image": sums.image, "product": sums.product},
                            {"count": sums.count, "next_batch": sums.next_batch, "skipped": skipped, **about})
                saved = time.monotonic()
        sums.skipped |= loader.skipped
    if sums.count == 0:
        raise RuntimeError(f"split (={split}) of {index.path} must have a readable image; all {len(sums.skipped)} failed")
    stats = sums.stats(index.split_sha256(split), split)
    if out is not None:  # a full disk must not cost the pass
        stats.save(out)
    partial.unlink(missing_ok=True)
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


@dataclass(frozen=True)
class _About:
    """Schema of the values of a pass under way."""
    index: str
    split: str
    batch: Count
    count: Count
    next_batch: Count
    skipped: dict[IdText, str]


@dataclass
class _Sums:
    """Exact integer sums of a pass under way."""
    image: npt.NDArray[np.int64]    # (S, S, 3)
    product: npt.NDArray[np.int64]  # (3, 3) sum over pixels of channel × channel
    count: int
    next_batch: int
    skipped: dict[int, str]

    def add(self, pixels: npt.NDArray[np.uint8], batch: int) -> None:
        """Add (B, S, S, 3) pixels of batch number `batch`."""
        self.image += pixels.sum(axis=0, dtype=np.int64)
        for image in pixels:  # float64 is exact below 2^53: 65,536 pixels of 255² are 2^32
            flat = image.reshape(-1, 3).astype(np.float64)
            self.product += (flat.T @ flat).astype(np.int64)
        self.count += len(pixels)
        self.next_batch = batch + 1

    @classmethod
    def resume(cls, path: Path, expected: dict[str, object], square_px: int) -> "_Sums":
        """The pass as last saved, if it was one over the same samples in the same batches; else a new one."""
        if path.exists():
            arrays, about = load_arrays(path, _About)
            if {key: vars(about)[key] for key in expected} == expected:
                return cls(arrays["image"], arrays["product"], about.count, about.next_batch, skipped_ids(about.skipped))
        return cls(np.zeros((square_px, square_px, 3), np.int64), np.zeros((3, 3), np.int64), 0, 0, {})

    def stats(self, index: str, split: str) -> Stats:
        """The sums as `Stats` of the images with this hash."""
        pixels = self.count * self.image.shape[0] * self.image.shape[1]
        mean = self.image.sum(axis=(0, 1)) / pixels
        values, vectors = np.linalg.eigh(self.product / pixels - np.outer(mean, mean))
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), range(3)])  # a sign eigh leaves open
        return Stats((self.image / self.count).astype(np.float32), mean.astype(np.float32), values, vectors, self.count,
                     self.skipped, index, split)
