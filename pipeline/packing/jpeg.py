"""What a packed image is: the options, the original decoded as the loaders see it, the JPEG made of it, and what that loses.

S side of the square; H row, W column of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterator

import numpy as np
import numpy.typing as npt

from pipeline.decoding import geometry
from pipeline.config import REGIONS, DataConfig, LoaderConfig
from pipeline.reading.source import Bytes, Reader, SampleError

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex

SUBSAMPLINGS = ("444", "422", "420")
BATCH = 32  # images decoded together: 6 MB of squares

Pixels = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes of packed images.

    The default, quality 90 without subsampling, on 300 photographs of ImageNet at 256 px (`--measure`; libjpeg-turbo, DALI on one
    core): 39.0 dB mean, 30.4 dB in the worst image, 25.7 kB, 0.36 ms to decode. Halved chroma is what hurts: with 4:2:0 the worst
    image stays at 24 dB whatever the quality (90: 37.0 and 24.0 dB, 20.5 kB, 0.28 ms; 95: 38.9 and 24.4 dB, 29.2 kB, 0.33 ms),
    and quality 85 without subsampling is better in as many bytes (37.3 and 27.8 dB, 20.4 kB, 0.33 ms). 90 is the lowest quality
    of those measured that keeps every image above 30 dB. The 0.08 ms it costs more than 4:2:0 are small beside the 1.3 ms that
    packing saves; where decoding limits nevertheless, `--subsampling 420` is a quarter faster.

    Attributes:
        region: ``square``, the central square (paper §2), or ``full``, the whole image at that short side.
        square_px: side S of the square, short side of a whole image (paper: 256).
        quality: of the JPEG, 1–100.
        subsampling: of its chroma: ``444`` none, ``422`` columns halved, ``420`` columns and rows.
        seed: of the order of the images.

    Raises:
        ValueError: a value outside its range.
    """
    region: str = "square"
    square_px: int = 256
    quality: int = 90
    subsampling: str = "444"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.region not in REGIONS:
            raise ValueError(f"--region (={self.region}) must be one of {', '.join(REGIONS)}; correct it")
        if self.subsampling not in SUBSAMPLINGS:
            raise ValueError(f"--subsampling (={self.subsampling}) must be one of {', '.join(SUBSAMPLINGS)}; correct it")
        for name, low, high in (("square_px", 1, 8192), ("quality", 1, 100), ("seed", 0, (1 << 63) - 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} (={getattr(self, name)}) must lie in {low}…{high}; correct it")


def decoded(index: "SampleIndex", split: str, ids: npt.NDArray[np.int64], options: PackOptions, threads: int,
            skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of the samples, in order, as the loaders see them; unreadable ones go into `skipped` instead."""
    from pipeline.loading.eval_loader import TestLoader

    if options.region == "full":
        yield from _whole(index, ids, options.square_px, threads, skipped)
        return
    data = DataConfig(region="square", square_px=options.square_px, crop_px=options.square_px, mirror=False, lighting=0,
                      mean="channel")
    with TestLoader(index, split, data, BATCH, None, machine=LoaderConfig(threads=threads), skip_corrupt=True, ids=ids) as loader:
        for batch in loader:
            skipped.update(loader.skipped)
            yield from zip(batch.ids.tolist(), batch.images.numpy())
        skipped.update(loader.skipped)


def _whole(index: "SampleIndex", ids: Ids, short_px: int, threads: int, skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of whole images at a short side of `short_px`, as `decoded`."""
    from pipeline.decoding.dali import DecodeError, WholeImages

    reader, many, one = Reader(index), WholeImages(BATCH, threads), None
    for first in range(0, len(ids), BATCH):
        chunk: list[int] = []
        views: list[Bytes] = []
        reader.announce(ids[first:first + BATCH])
        for id in ids[first:first + BATCH].tolist():
            try:
                views.append(reader.read(id))
                chunk.append(id)
            except SampleError as error:
                skipped[id] = error.reason
        rows = index.samples[chunk]
        sizes = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
        resized = geometry.resized(sizes, short_px)
        try:
            if chunk:
                yield from zip(chunk, many.images(views, sizes, resized))
            continue
        except DecodeError:
            pass  # it does not say which one
        one = one or WholeImages(1, 1)
        for i, id in enumerate(chunk):
            try:
                yield id, one.images(views[i:i + 1], sizes[i:i + 1], resized[i:i + 1])[0]
            except DecodeError as error:
                skipped[id] = error.reason


def encode(pixels: Pixels, quality: int, subsampling: str) -> bytes:
    """(H, W, 3) uint8 RGB → JPEG, by libjpeg-turbo."""
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling))


def squared_error(pixels: Pixels, jpeg: bytes) -> int:
    """Sum of squared differences between pixels and their JPEG, grey levels squared; exact."""
    import simplejpeg

    return int(((simplejpeg.decode_jpeg(jpeg, "RGB").astype(np.int64) - pixels) ** 2).sum())


def psnr(error: int, pixels: int) -> float:
    """Peak signal-to-noise ratio in dB of a squared error summed over so many pixels of three channels; at most 100, so that
    equal pixels have a number too."""
    return float(min(10 * np.log10(255 ** 2 * 3 * pixels / max(error, 1e-9)), 100.0))


def encoder() -> str:
    """The libraries that decide the bytes: `simplejpeg 1.9.0, DALI 2.4.0`."""
    import nvidia.dali
    import simplejpeg

    return f"simplejpeg {simplejpeg.__version__}, DALI {nvidia.dali.__version__}"


def allowed(index: SampleIndex, split: str, budget: float) -> int:
    """How many samples of a split may be unreadable."""
    return int(np.ceil(budget * len(index.ids(split))))


def check_budget(index: "SampleIndex", split: str, skipped: dict[int, str], budget: int) -> None:
    """Raises RuntimeError when more samples of a split are unreadable than may be."""
    if len(skipped) > budget:
        id, why = next(iter(skipped.items()))
        raise RuntimeError(f"unreadable samples of {split} (={len(skipped)}) must not exceed the budget (={budget}); one of "
                           f"them: {index.safe_name(id)} {why}; look with `python tools/build_index.py verify {index.path} "
                           "--scrub`, and raise --budget to go on without them")
