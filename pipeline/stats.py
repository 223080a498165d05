"""Mean image, channel mean and RGB principal components of a training set (paper §2, §4.1), exact and resumable.

All sums are integers of uint8 pixels, so they do not depend on the order of the images and a pass that is interrupted and
continued gives the same bits. S side of the central square; pixel values 0–255.
"""
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig, LoaderConfig

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex

_SAVE_S = 30.0  # seconds between saves of a pass under way


@dataclass(frozen=True)
class Stats:
    """What a training set's pixels are like.

    Attributes:
        mean_image: (S, S, 3) float32 mean of the central squares, RGB.
        channel_mean: (3,) float32 its mean over all pixels.
        eigenvalues: (3,) float64 of the covariance of RGB over all pixels, grey levels squared, largest first.
        eigenvectors: (3, 3) float64, column i belongs to eigenvalue i; the largest entry of each is positive.
        count: images used.
        skipped: unreadable ones, id → reason.
        index: SHA-256 of the images they were computed on (`SampleIndex.split_sha256`).
        split: the split.
    """
    mean_image: npt.NDArray[np.float32]
    channel_mean: npt.NDArray[np.float32]
    eigenvalues: npt.NDArray[np.float64]
    eigenvectors: npt.NDArray[np.float64]
    count: int
    skipped: dict[int, str]
    index: str
    split: str

    @property
    def square_px(self) -> int:
        return int(self.mean_image.shape[0])

    @property
    def mean_image_chw(self) -> npt.NDArray[np.float32]:
        """(3, S, S) float32."""
        return np.ascontiguousarray(self.mean_image.transpose(2, 0, 1))

    @property
    def sha256(self) -> str:
        """Hash of all the numbers."""
        digest = hashlib.sha256()
        for array in (self.mean_image, self.channel_mean, self.eigenvalues, self.eigenvectors):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def expect(self, square_px: int) -> "Stats":
        """Itself, if it was computed at this size.

        Raises:
            ValueError: it was not.
        """
        if self.square_px != square_px:
            raise ValueError(f"stats (={self.square_px} px) must be computed at data.square_px (={square_px}); run "
                             f"tools/compute_stats.py with --square-px {square_px}")
        return self

    def save(self, path: str | Path) -> None:
        """Write one .npz, atomically."""
        about = {"count": self.count, "skipped": self.skipped, "index": self.index, "split": self.split, "sha256": self.sha256}
        _write(Path(path), {"mean_image": self.mean_image, "channel_mean": self.channel_mean, "eigenvalues": self.eigenvalues,
                            "eigenvectors": self.eigenvectors}, about)

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file, or its hash does not fit its numbers.
        """
        arrays, about = _read(Path(path))
        try:
            stats = cls(arrays["mean_image"], arrays["channel_mean"], arrays["eigenvalues"], arrays["eigenvectors"],
                        int(about["count"]), {int(id): why for id, why in about["skipped"].items()}, about["index"],
                        about["split"])
            expected = about["sha256"]
        except KeyError as error:
            raise ValueError(f"stats file {path} (without {error}) must be one that tools/compute_stats.py wrote; "
                             "compute it again") from error
        if stats.sha256 != expected:
            raise ValueError(f"stats file {path} (SHA-256 {stats.sha256[:12]}) must have the recorded hash "
                             f"{expected[:12]}; it is damaged, compute it again")
        return stats

    @classmethod
    def for_index(cls, index: "SampleIndex", square_px: int, split: str = "train") -> "Stats":
        """The stats of a split that lie beside an index.

        Raises:
            ValueError: none of this size, or the split has other images by now.
        """
        path = stats_path(index.path, square_px, split)
        command = (f"run `python tools/compute_stats.py {index.path} --square-px {square_px}"
                   + ("`" if split == "train" else f" --split {split}`"))
        if not path.exists():
            raise ValueError(f"stats {path} must exist before training; {command}")
        stats = cls.load(path)
        now = index.split_sha256(split)
        if stats.index != now or stats.split != split:
            raise ValueError(f"stats {path} (of images {stats.index[:12]}) must belong to split {split} of the index as it "
                             f"is now (={now[:12]}); {command}")
        return stats


def stats_path(index: str | Path, square_px: int, split: str = "train") -> Path:
    """Where the stats of a split lie: beside the index."""
    return Path(index) / f"stats-{split}-{square_px}.npz"


def compute(index: "SampleIndex", split: str, square_px: int, *, machine: LoaderConfig = LoaderConfig(), batch: int = 64,
            device_id: int | None = None, progress: Callable[[int, int], None] | None = None, save_s: float = _SAVE_S) -> Stats:
    """One pass over a split through the training's own decode and resize.

    A pass that was interrupted goes on where it last saved (``stats-<split>-<S>.partial.npz`` beside the index).

    Args:
        index, split: the samples; unreadable ones are skipped, listed, and bounded by `machine.quarantine_budget`.
        square_px: short side after the resize and side of the square.
        machine, device_id: as for the loaders.
        batch: images decoded together.
        progress: called with (images done, images in all).
        save_s: seconds between saves.

    Raises:
        RuntimeError: more unreadable samples than the budget allows.
    """
    from pipeline.loading.train_loader import quarantine_budget
    from pipeline.loading.eval_loader import TestLoader

    total = len(index.ids(split))
    sums = _Sums.resume(index, split, square_px, batch)
    config = DataConfig(region="square", square_px=square_px, crop_px=square_px, mirror=False, lighting=0, mean="channel")
    budget = quarantine_budget(machine, total)
    saved = time.monotonic()
    with TestLoader(index, split, config, batch, None, machine=machine, device_id=device_id, skip_corrupt=True,
                    first=sums.next_batch) as loader:
        for found in loader:
            sums.add(found.images.cpu().numpy(), found.step)
            skipped = sums.skipped | loader.skipped
            if len(skipped) > budget:
                id, why = next(iter(skipped.items()))
                raise RuntimeError(f"unreadable samples (={len(skipped)} of {total}) must not exceed the budget (={budget}); "
                                   f"the first: {index.safe_name(id)} {why}; run `python tools/build_index.py verify "
                                   f"{index.path} --scrub --exclude`")
            if progress is not None:
                progress(min(sums.next_batch * batch, total), total)
            if time.monotonic() - saved > save_s:
                sums.save(index, split, batch, skipped)
                saved = time.monotonic()
        sums.skipped |= loader.skipped
    return sums.finish(index, split)


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
        for one in pixels:  # float64 is exact below 2^53: 65,536 pixels of 255² are 2^32
            flat = one.reshape(-1, 3).astype(np.float64)
            self.product += (flat.T @ flat).astype(np.int64)
        self.count += len(pixels)
        self.next_batch = batch + 1

    @staticmethod
    def _path(index: "SampleIndex", split: str, square_px: int) -> Path:
        return stats_path(index.path, square_px, split).with_suffix(".partial.npz")

    def save(self, index: "SampleIndex", split: str, batch: int, skipped: dict[int, str]) -> None:
        """Save the pass so far."""
        about = {"count": self.count, "next_batch": self.next_batch, "skipped": skipped,
                 "index": index.split_sha256(split), "split": split,
                 "batch": batch}
        _write(self._path(index, split, self.image.shape[0]), {"image": self.image, "product": self.product}, about)

    @classmethod
    def resume(cls, index: "SampleIndex", split: str, square_px: int, batch: int) -> "_Sums":
        """The pass as last saved, if it was one over the same samples in the same batches; else a new one."""
        path = cls._path(index, split, square_px)
        if path.exists():
            arrays, about = _read(path)
            if (about.get("index"), about.get("split"), about.get("batch")) == (index.split_sha256(split), split, batch):
                return cls(arrays["image"], arrays["product"], about["count"], about["next_batch"],
                           {int(id): why for id, why in about["skipped"].items()})
        return cls(np.zeros((square_px, square_px, 3), np.int64), np.zeros((3, 3), np.int64), 0, 0, {})

    def finish(self, index: "SampleIndex", split: str) -> Stats:
        """Turn the sums into `Stats` and remove the saved pass."""
        if self.count == 0:
            raise RuntimeError(f"split (={split}) of {index.path} must have a readable image; all {len(self.skipped)} failed")
        pixels = self.count * self.image.shape[0] * self.image.shape[1]
        mean = self.image.sum(axis=(0, 1)) / pixels
        values, vectors = np.linalg.eigh(self.product / pixels - np.outer(mean, mean))
        values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), range(3)])  # a sign eigh leaves open
        self._path(index, split, self.image.shape[0]).unlink(missing_ok=True)
        return Stats((self.image / self.count).astype(np.float32), mean.astype(np.float32), values, vectors, self.count,
                     self.skipped, index.split_sha256(split), split)


def _write(path: Path, arrays: dict[str, npt.NDArray[Any]], about: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    # NumPy's stubs take **arrays for its keyword allow_pickle
    np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(arrays.pop("about").tobytes())
    except Exception as error:  # zipfile, NumPy and json each have errors of their own for a damaged file
        raise ValueError(f"stats file {path} ({type(error).__name__}) must be one that tools/compute_stats.py wrote; "
                         "delete it and compute it again") from error
