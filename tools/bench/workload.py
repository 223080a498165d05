"""The work that every contender of `make bench` does, and the check that it did it.

A photograph is decoded, its short side brought to 256 pixels (linear, antialiased), a random 227 crop cut out of the central
square, half of them flipped, PCA colour jitter added and the mean image subtracted; a batch is handed over as (B, 3, 227, 227)
float32. Of its first batch a contender tells the photographs and the augmentation parameters; the same pixels are then made
again, slowly, with PIL, and compared.

B batch, H row, W column. Parameters of an image are six numbers: top, left (pixels of the 256 square), flip (0 or 1), and what
the colour jitter adds to red, green and blue (grey levels).
"""
import importlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.sampling.augment import lighting_shift
from pipeline.stats import Stats
from tools.bench.workers import NotAvailable

SQUARE_PX, CROP_PX = 256, 227
DATA = DataConfig(region="square", square_px=SQUARE_PX, crop_px=CROP_PX, mirror=True, lighting=0.1, mean="image")

Ids = npt.NDArray[np.int64]  # (B,)
Parameters = npt.NDArray[np.float32]  # (B, 6)
Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


def need(module: str) -> Any:
    """An optional module. Raises NotAvailable when it is not installed, or cannot be loaded."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            raise NotAvailable(f"{error.name} is not installed") from None
        raise NotAvailable(f"{module} cannot be loaded: {' '.join(str(error).split())[:160]}") from None


@dataclass(frozen=True)
class Task:
    """What a contender is given. All of it travels to another process."""
    index: Path  # folder of the index of the original files
    packed: Path | None  # folder of the index of the same photographs packed at 256 px
    stats: Path  # the training set's mean image and colour components at 256 px, used by every contender
    scratch: Path  # for what a contender needs beside the files themselves: WebDataset tars of them, resized images
    batch: int = 64
    workers: int = 2  # threads or processes of each contender


@dataclass(frozen=True)
class Augmented:
    """A batch with what is needed to make it again."""
    images: Any  # (B, 3, crop, crop) float32, any array
    ids: Ids
    parameters: Parameters


@dataclass(frozen=True)
class Running:
    """A contender at work."""
    batches: Iterator[Any]  # without end
    describe: Callable[[Any], Augmented] | None  # a batch with its parameters; None: the contender makes no pixels
    close: Callable[[], None] = lambda: None  # ends its threads


class Photographs:
    """The training files of one kind (`original` or `packed`), as a contender reads them. Opened where it is used first, so that
    it travels to worker processes as a few paths."""

    def __init__(self, task: Task, kind: str) -> None:
        self.task, self.kind = task, kind

    def __reduce__(self) -> tuple[Any, ...]:
        return Photographs, (self.task, self.kind)

    @cached_property
    def index(self) -> SampleIndex:
        """The index of these files. Raises NotAvailable."""
        path = self.task.packed if self.kind == "packed" else self.task.index
        if path is None:
            raise NotAvailable("there are no packed shards")
        return SampleIndex.load(path)

    @cached_property
    def ids(self) -> Ids:
        """(N,) of all."""
        return self.index.ids("train")

    @cached_property
    def stats(self) -> Stats:
        return Stats.load(self.task.stats)

    @cached_property
    def _maps(self) -> dict[int, npt.NDArray[np.uint8]]:
        return {position: np.asarray(np.memmap(self.index.archive_path(position), np.uint8, "r"))
                for position, archive in enumerate(self.index.archives) if not archive.is_folder}

    def read(self, id: int) -> npt.NDArray[np.uint8]:
        """The bytes of a photograph: of an archive, a view of memory."""
        row = self.index.samples[id]
        if (mapped := self._maps.get(int(row["archive"]))) is None:
            return np.frombuffer(self.index.read(id), np.uint8)
        return mapped[int(row["offset"]):int(row["offset"]) + int(row["size"])]

    def draw(self, random: np.random.Generator, count: int) -> Parameters:
        """(count, 6) parameters, as a program without our counters would draw them."""
        corners = random.integers(0, SQUARE_PX - CROP_PX + 1, (count, 2))
        shift = lighting_shift(random.normal(0, DATA.lighting, (count, 3)), self.stats.eigenvalues, self.stats.eigenvectors)
        return np.hstack([corners, random.random((count, 1)) < 0.5, shift]).astype(np.float32)

    def batches(self) -> Iterator[tuple[Ids, Parameters]]:
        """Random ids and parameters without end."""
        random = np.random.default_rng(0)
        while True:
            yield random.choice(self.ids, self.task.batch), self.draw(random, self.task.batch)

    def resized(self, id: int) -> Pixels:
        """(256, 256, 3) the central square of a resized photograph, made slowly with PIL: the reference."""
        Image = need("PIL.Image")
        image = Image.open(io.BytesIO(self.read(id).tobytes())).convert("RGB")
        width, height = resized_size(image.size)
        left, top = (width - SQUARE_PX) // 2, (height - SQUARE_PX) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + SQUARE_PX, top + SQUARE_PX)))

    def resized_file(self) -> Path:
        """The .npy file (N, 256, 256, 3) uint8 of all resized photographs in the order of `ids`, made when it is not there."""
        path = self.task.scratch / f"resized-{self.kind}.npy"
        if not path.exists():
            images = np.lib.format.open_memmap(path.with_suffix(".tmp"), "w+", np.uint8, (len(self.ids), SQUARE_PX, SQUARE_PX, 3))
            for row, id in enumerate(self.ids.tolist()):
                images[row] = self.resized(id)
            images.flush()
            os.replace(path.with_suffix(".tmp"), path)
        return path

    def shards(self) -> list[str]:
        """WebDataset tars of these files: the packed ones as they lie, or two written now, so that each worker has its own."""
        if self.kind == "packed":
            return sorted({str(self.index.archive_path(int(archive)))
                           for archive in np.unique(self.index.samples["archive"][self.ids])})
        paths = [self.task.scratch / f"original-{part}.tar" for part in range(2)]
        for part, path in enumerate(paths):
            if path.exists():
                continue
            with need("webdataset").TarWriter(str(path.with_suffix(".tmp"))) as tar:
                for id in self.ids[part::2].tolist():
                    label = str(self.index.samples["label"][id])
                    tar.write({"__key__": f"{id:08d}", "jpg": self.read(id).tobytes(), "cls": label})
            os.replace(path.with_suffix(".tmp"), path)
        return [str(path) for path in paths]

    def id_of(self, content: bytes) -> int:
        """Which photograph these bytes are (by CRC-32; for the check of a first batch, not while the clock runs)."""
        return int(self.ids[np.flatnonzero(self.index.samples["crc32"][self.ids] == zlib.crc32(content))[0]])


def resized_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the short side at 256, the long one rounded half up, as `pipeline.decoding.geometry.resized`."""
    short = min(size)
    width, height = ((2 * side * SQUARE_PX + short) // (2 * short) for side in size)
    return width, height


def difference(photographs: Photographs, augmented: Augmented) -> float:
    """Mean absolute difference, in grey levels, between a batch and the same one made slowly. Raises RuntimeError when it is not
    (B, 3, crop, crop) float32."""
    images, expected_shape = np.asarray(augmented.images), (photographs.task.batch, 3, CROP_PX, CROP_PX)
    if images.shape != expected_shape or images.dtype != np.float32:
        raise RuntimeError(f"first batch (={images.shape} {images.dtype}) must be {expected_shape} float32")
    mean, total = photographs.stats.mean_image, 0.0
    for image, id, (top, left, flip, *shift) in zip(images, augmented.ids.tolist(), augmented.parameters):
        crop = slice(int(top), int(top) + CROP_PX), slice(int(left), int(left) + CROP_PX)
        expected = photographs.resized(id)[crop].astype(np.float32) - mean[crop] + np.float32(shift)
        expected = expected[:, ::-1] if flip else expected
        total += float(np.abs(image - expected.transpose(2, 0, 1)).mean())
    return total / len(images)
