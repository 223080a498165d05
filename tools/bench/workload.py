"""The work that every side of `tools/bench/__main__.py` does, and the check that it did.

The one concept: a photograph is decoded, its short side brought to 256 pixels (linear, antialiased), a random 227 crop cut
out of the central square, half of them reflected, lighting noise added and the mean image subtracted; 64 of them are
handed over as (64, 3, 227, 227) float32. A side tells of its first batch which photographs it holds and what was drawn
for them; the same pixels are then made again, slowly, with PIL, and compared.

Legend: B batch, C channel, H row, W column, S 256. A draw is a row of six numbers: top, left (pixels of the square),
mirror (0 or 1), and what the lighting noise adds to red, green and blue (grey levels).
"""
from __future__ import annotations

import importlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pipeline.config import DataConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.stats import Stats

SQUARE_PX, CROP_PX, LIGHTING = 256, 227, 0.1

Draws = npt.NDArray[np.float32]     # (B, 6)
Pixels = npt.NDArray[np.uint8]      # (H, W, 3) RGB


class NotAvailable(RuntimeError):
    """A side that cannot run here, and why: its package is not installed, or not of this version."""


def need(module: str) -> Any:
    """An optional module. Raises NotAvailable when it is not installed, or cannot be loaded."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            raise NotAvailable(f"{error.name} is not installed") from None
        raise NotAvailable(f"{module} cannot be loaded: {' '.join(str(error).split())[:160]}") from None


@dataclass(frozen=True)
class Work:
    """What a side is given. All of it travels to another process.

    Attributes:
        index: folder of the index of the original files.
        packed: folder of the index of the same photographs packed at 256 px, or None.
        stats: file of the training set's mean image and colour components at 256 px, used by every side.
        scratch: folder for what a side needs beside the files themselves: a WebDataset tar of them, a .beton, squares.
        split: of the index.
        batch: B.
        workers: threads or processes of each side.
    """
    index: Path
    packed: Path | None
    stats: Path
    scratch: Path
    split: str = "train"
    batch: int = 64
    workers: int = 2


@dataclass(frozen=True)
class Told:
    """A batch with what is needed to make it again: images (B, 3, crop, crop) float32 (any array), ids (B,), draws (B, 6)."""
    images: Any
    ids: npt.NDArray[np.int64]
    draws: Draws


@dataclass(frozen=True)
class Running:
    """A side at work: batches without end, what the first of them holds (None: the side makes no pixels), its end."""
    batches: Iterator[Any]
    told: Callable[[Any], Told] | None
    close: Callable[[], None] = lambda: None


class Material:
    """The photographs of one kind (`original` or `packed` bytes), as a side reads them. Opened where it is used first, so
    that it travels to worker processes as a few paths."""

    def __init__(self, work: Work, data: str) -> None:
        self.work, self.data = work, data

    def __reduce__(self) -> tuple[Any, ...]:
        return Material, (self.work, self.data)

    @cached_property
    def index(self) -> SampleIndex:
        """The index of these bytes."""
        from pipeline.index.sample_index import SampleIndex
        if self.data == "packed" and self.work.packed is None:
            raise NotAvailable("there are no packed shards")
        return SampleIndex.load(self.work.packed if self.data == "packed" and self.work.packed else self.work.index)

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """(N,) of the split."""
        return self.index.ids(self.work.split)

    @cached_property
    def stats(self) -> Stats:
        """Of the training set, the same for all sides."""
        from pipeline.stats import Stats
        return Stats.load(self.work.stats)

    @cached_property
    def _reader(self) -> Any:
        from pipeline.reading.source import Reader
        return Reader(self.index, check_crc=False)

    def read(self, id: int) -> npt.NDArray[np.uint8]:
        """The bytes of a photograph: a view of the memory-mapped archive."""
        view: npt.NDArray[np.uint8] = self._reader.read(id)
        return view

    def draw(self, random: np.random.Generator, count: int) -> Draws:
        """(count, 6) draws, as a program without our counters would make them."""
        from pipeline.sampling.augment import lighting_shift
        places = random.integers(0, SQUARE_PX - CROP_PX + 1, (count, 2))
        shift = lighting_shift(random.normal(0, LIGHTING, (count, 3)), self.stats.eigenvalues, self.stats.eigenvectors)
        return np.hstack([places, random.random((count, 1)) < 0.5, shift]).astype(np.float32)

    def square(self, id: int) -> Pixels:
        """(S, S, 3) the central square of a photograph, made slowly with PIL: the reference."""
        from PIL import Image
        image = Image.open(io.BytesIO(self.read(id).tobytes())).convert("RGB")
        width, height = resized_size(image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - SQUARE_PX) // 2, (height - SQUARE_PX) // 2
        return np.asarray(image.crop((left, top, left + SQUARE_PX, top + SQUARE_PX)))

    def squares(self) -> Path:
        """The .npy file (N, S, S, 3) uint8 of the squares of all photographs in the order of `ids`, made when it is not there."""
        path = self.work.scratch / f"squares-{self.data}.npy"
        if not path.exists():
            whole = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.uint8, (len(self.ids), SQUARE_PX, SQUARE_PX, 3))
            for row, id in enumerate(self.ids):
                whole[row] = self.square(int(id))
            whole.flush()
            os.replace(path.with_suffix(".tmp"), path)
        return path

    def shards(self) -> list[str]:
        """WebDataset tars of these bytes: the packed ones as they lie, or two written now, so that each worker has its own."""
        if self.data == "packed":
            return sorted({str(self.index.archive_path(int(position)))
                           for position in np.unique(self.index.samples["archive"][self.ids])})
        paths = [self.work.scratch / f"original-{part}.tar" for part in range(2)]
        for part, path in enumerate(paths):
            if path.exists():
                continue
            with tarfile.open(path.with_suffix(".tmp"), "w", format=tarfile.USTAR_FORMAT) as tar:
                for id in self.ids[part::2]:
                    label = int(self.index.samples["label"][id])
                    for suffix, content in (("jpg", self.read(int(id)).tobytes()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{id:08d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            os.replace(path.with_suffix(".tmp"), path)
        return [str(path) for path in paths]

    def id_of(self, content: bytes) -> int:
        """Which photograph these bytes are (by CRC-32; for the check of a first batch, not for the clock)."""
        import zlib
        return int(self.ids[np.flatnonzero(self.index.samples["crc32"][self.ids] == zlib.crc32(content))[0]])


def resized_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the short side at S, the long one rounded half up, as `pipeline.decoding.geometry.resized`."""
    short = min(size)
    width, height = ((2 * side * SQUARE_PX + short) // (2 * short) for side in size)
    return width, height


def data_config() -> DataConfig:
    """The paper's training crops."""
    from pipeline.config import DataConfig
    return DataConfig(region="square", square_px=SQUARE_PX, crop_px=CROP_PX, mirror=True, lighting=LIGHTING, mean="image")


def difference(material: Material, told: Told, batch: int) -> float:
    """Mean absolute difference, in grey levels, between a batch and the same one made slowly.

    Raises:
        RuntimeError: it is not (B, 3, crop, crop) float32.
    """
    images = np.asarray(told.images)
    if images.shape != (batch, 3, CROP_PX, CROP_PX) or images.dtype != np.float32:
        raise RuntimeError(f"first batch (={images.shape} {images.dtype}) must be {(batch, 3, CROP_PX, CROP_PX)} float32")
    mean = material.stats.mean_image
    total = 0.0
    for image, id, (top, left, mirror, *shift) in zip(images, told.ids, told.draws):
        place = slice(int(top), int(top) + CROP_PX), slice(int(left), int(left) + CROP_PX)
        expected = material.square(int(id))[place].astype(np.float32) - mean[place] + np.float32(shift)
        if mirror:
            expected = expected[:, ::-1]
        total += float(np.abs(image - expected.transpose(2, 0, 1)).mean())
    return total / batch
