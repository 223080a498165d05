"""The work that every contender of `make bench` does, and the check that it did it.

Work `alexnet`: a photograph is decoded, its short side brought to 256 pixels (linear, antialiased), a random 227 crop cut out
of the central square, half of them flipped, PCA colour jitter added and the mean image subtracted. Work `random_resized`: a box
as torchvision's RandomResizedCrop draws it, resized to 224, half of them flipped, ImageNet's mean subtracted, divided by its
standard deviation. A batch is handed over as (B, 3, crop, crop) float32. Of its first batch a contender tells the photographs and
the augmentation parameters; the same pixels are then made again, slowly, with PIL, and compared.

B batch, H row, W column. Parameters of an image are six numbers: top, left, flip (0 or 1), and for `alexnet`, whose places are
pixels of the 256 square, what the colour jitter adds to red, green and blue (grey levels); for `random_resized` height and width
of the box, in pixels of the image that is read, and a seed, from which whoever decodes draws the box where the height is 0.
"""
import importlib
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config import DataConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.sampling.augment import lighting_shift
from pipeline.stats import Stats
from tools.bench.workers import NotAvailable

SQUARE_PX = 256
WORKS = {"alexnet": DataConfig(), "random_resized": DataConfig.preset("imagenet")}

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
    work: str = "alexnet"

    @property
    def data(self) -> DataConfig:
        return WORKS[self.work]


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
        data, flips = self.task.data, random.random((count, 1)) < 0.5
        if data.resized_boxes:
            zeros = np.zeros((count, 2))
            return np.hstack([zeros, flips, zeros, random.integers(0, 1 << 24, (count, 1))]).astype(np.float32)
        corners = random.integers(0, SQUARE_PX - data.crop_px + 1, (count, 2))
        shift = lighting_shift(random.normal(0, data.lighting, (count, 3)), self.stats.eigenvalues, self.stats.eigenvectors)
        return np.hstack([corners, flips, shift]).astype(np.float32)

    def batches(self) -> Iterator[tuple[Ids, Parameters]]:
        """Random ids and parameters without end."""
        random = np.random.default_rng(0)
        while True:
            yield random.choice(self.ids, self.task.batch), self.draw(random, self.task.batch)

    def resized(self, id: int) -> Pixels:
        """(256, 256, 3) the central square of a resized photograph, made slowly with PIL: the reference."""
        Image, image = need("PIL.Image"), self.decoded(id)
        width, height = resized_size(image.size)
        left, top = (width - SQUARE_PX) // 2, (height - SQUARE_PX) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image.crop((left, top, left + SQUARE_PX, top + SQUARE_PX)))

    def decoded(self, id: int) -> Any:
        """A photograph as a PIL image."""
        return need("PIL.Image").open(io.BytesIO(self.read(id).tobytes())).convert("RGB")

    def exact(self, id: int, numbers: Sequence[float], squares: bool) -> npt.NDArray[np.float32]:
        """(3, crop, crop) the finished image of a photograph, or of its resized square, made slowly with PIL; grey levels, also
        where those handed over are not."""
        (top, left, flip, *others), size, Image = numbers, self.task.data.crop_px, need("PIL.Image")
        if self.task.data.resized_boxes:
            image = Image.fromarray(self.resized(id)) if squares else self.decoded(id)
            y, x, height, width = box_of(image.size[1], image.size[0], numbers)
            pixels = np.asarray(image.crop((x, y, x + width, y + height)).resize((size, size), Image.Resampling.BILINEAR))
            expected = pixels.astype(np.float32)
        else:
            crop = slice(int(top), int(top) + size), slice(int(left), int(left) + size)
            expected = self.resized(id)[crop].astype(np.float32) - self.stats.mean_image[crop] + np.array(others, np.float32)
        return (expected[:, ::-1] if flip else expected).transpose(2, 0, 1)

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


def box_of(height: int, width: int, numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the box of an image of this size: as the parameters say, or as torchvision draws it."""
    if numbers[3]:
        return int(numbers[0]), int(numbers[1]), int(numbers[3]), int(numbers[4])
    random, (scale, ratio) = Random(int(numbers[5])), (WORKS["random_resized"].scale, WORKS["random_resized"].ratio)
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        shape = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        down, across = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 0 < down <= height and 0 < across <= width:
            return random.randint(0, height - down), random.randint(0, width - across), down, across
    down, across = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return (height - down) // 2, (width - across) // 2, down, across


def difference(photographs: Photographs, augmented: Augmented, squares: bool = False) -> float:
    """Mean absolute difference, in grey levels, between a batch and the same one made slowly, of `squares` where boxes are taken
    of resized images. Raises RuntimeError when it is not (B, 3, crop, crop) float32."""
    data = photographs.task.data
    images, expected_shape = np.asarray(augmented.images), (photographs.task.batch, 3, data.crop_px, data.crop_px)
    if images.shape != expected_shape or images.dtype != np.float32:
        raise RuntimeError(f"first batch (={images.shape} {images.dtype}) must be {expected_shape} float32")
    if data.std:
        mean, std = (255 * np.array(values)[:, None, None] for values in (data.mean, data.std))
        images = images * std + mean
    return float(np.mean([np.abs(image - photographs.exact(id, numbers, squares)).mean() for image, id, numbers in
                          zip(images, augmented.ids.tolist(), augmented.parameters.tolist())]))
