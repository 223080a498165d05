"""Mean image, channel mean and RGB principal components of a training set (paper §2, §4.1): the class and its file.

`pipeline.compute_stats` computes them. S: side of the central square; pixel values 0–255.
"""
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.files import atomic_write
from pipeline.index.sample_index import SampleIndex
from pipeline.io_errors import reading
from pipeline.schema import Count, read_as

IdText = Annotated[str, lambda text: "" if text.isdecimal() and text.isascii() else "must be the id of a sample"]


@dataclass(frozen=True)
class _About:
    """Schema of the values beside the arrays; see `Stats`."""
    count: Count
    skipped: dict[IdText, str]
    index: str
    split: str
    sha256: str


class NoStats(ValueError):
    """There are no statistics of these images, or only of others."""


@dataclass(frozen=True)
class Stats:
    """Pixel statistics of a split."""
    mean_image: npt.NDArray[np.float32]    # (S, S, 3), mean of the central squares, RGB
    channel_mean: npt.NDArray[np.float32]  # (3,), its mean over all pixels
    eigenvalues: npt.NDArray[np.float64]   # (3,), of the covariance of RGB over all pixels, grey levels squared, largest first
    eigenvectors: npt.NDArray[np.float64]  # (3, 3), column i belongs to eigenvalue i; the largest entry of each is positive
    count: int  # images used
    skipped: dict[int, str]  # unreadable ones, id → reason
    index: str  # SHA-256 of the images they were computed on (`SampleIndex.split_sha256`)
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
        for array in self._arrays().values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {name: vars(self)[name] for name in ("mean_image", "channel_mean", "eigenvalues", "eigenvectors")}

    @classmethod
    def none(cls, square_px: int) -> "Stats":
        """Zeros, for images that depend on no statistics (`DataConfig.needs_stats`)."""
        zeros = np.zeros(3)
        return cls(np.zeros((square_px, square_px, 3), np.float32), zeros.astype(np.float32), zeros, np.eye(3), 0, {}, "", "")

    def expect(self, square_px: int) -> "Stats":
        """Itself, if it was computed at this size. Raises ValueError if not."""
        if self.square_px != square_px:
            raise ValueError(f"stats (={self.square_px} px) must be computed at data.square_px (={square_px}); run "
                             f"tools/compute_stats.py with --square-px {square_px}")
        return self

    def save(self, path: str | Path) -> None:
        """Write one .npz, atomically."""
        about = {name: getattr(self, name) for name in ("count", "skipped", "index", "split", "sha256")}
        with atomic_write(Path(path)) as file:
            # NumPy's stubs take **arrays for its keyword allow_pickle
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                     **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "Stats":
        """Read what `save` wrote. Raises OSError; ValueError: not such a file, or its hash does not fit its numbers."""
        with reading(Path(path)):
            content = io.BytesIO(Path(path).read_bytes())
        try:
            with np.load(content, allow_pickle=False) as file:
                arrays = dict(file)
            about = read_as(_About, json.loads(arrays.pop("about").tobytes()), "about")
        except Exception as error:  # zipfile, NumPy and json each have errors of their own for a damaged file
            raise ValueError(f"stats file {path} ({type(error).__name__}) must be one that tools/compute_stats.py wrote; "
                             "delete it and compute it again") from error
        kinds = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        side = max(arrays.get("mean_image", np.empty(0)).shape, default=0)
        if kinds != {"mean_image": ((side, side, 3), np.float32), "channel_mean": ((3,), np.float32),
                     "eigenvalues": ((3,), np.float64), "eigenvectors": ((3, 3), np.float64)}:
            raise ValueError(f"stats file {path} (={', '.join(kinds)}) must hold the arrays that tools/compute_stats.py writes; "
                             "delete it and compute it again")
        if not all(np.isfinite(array).all() for array in arrays.values()) or (arrays["eigenvalues"] < 0).any():
            raise ValueError(f"stats file {path} (=NaN, infinite or negative) must hold finite numbers, and eigenvalues from 0 "
                             "up; delete it and compute it again")
        stats = cls(**arrays, count=about.count, skipped={int(id): why for id, why in about.skipped.items()},
                    index=about.index, split=about.split)
        if stats.sha256 != about.sha256:
            raise ValueError(f"stats file {path} (SHA-256 {stats.sha256[:12]}) must have the recorded hash "
                             f"{about.sha256[:12]}; it is damaged, compute it again")
        return stats

    @classmethod
    def for_index(cls, index: SampleIndex, square_px: int, split: str = "train") -> "Stats":
        """The stats of a split that lie beside an index. Raises NoStats: none of this size, or the split has other images;
        ValueError: they are damaged."""
        path = stats_path(index.path, square_px, split)
        command = (f"run `alexnet stats {index.path} --square-px {square_px}"
                   + ("`" if split == "train" else f" --split {split}`"))
        if not path.exists():
            raise NoStats(f"stats {path} must exist before training; {command}")
        stats, now = cls.load(path), index.split_sha256(split)
        if stats.index != now or stats.split != split:
            raise NoStats(f"stats {path} (of images {stats.index[:12]}) must belong to split {split} of the index as it "
                          f"is now (={now[:12]}); {command}")
        return stats


def mean_image(data: DataConfig, stats: Stats) -> npt.NDArray[np.float32] | None:
    """(3, S, S) grey levels, the mean image that images are subtracted pieces of; None where `data` says they are not."""
    return stats.mean_image_chw if data.mean in ("image", "image_center") and data.output != "uint8" else None


def channel_mean(data: DataConfig, stats: Stats) -> npt.NDArray[np.float32] | None:
    """(3,) grey levels, the mean that is subtracted of every pixel; None where `data` says that it is not."""
    if data.output == "uint8" or data.mean in ("image", "image_center"):
        return None
    return stats.channel_mean if data.mean == "channel" else 255 * np.array(data.mean, np.float32)


def stats_path(index: str | Path, square_px: int, split: str = "train") -> Path:
    """Where the stats of a split lie: beside the index."""
    return Path(index) / f"stats-{split}-{square_px}.npz"
