"""The images of a packing: originals decoded as the loaders see them, encoded as small JPEGs, and the error that costs.

H row, W column of an image.
"""

from __future__ import annotations

import math
from typing import Iterator

import numpy as np
import numpy.typing as npt
import nvidia.dali
import simplejpeg

from pipeline.config import DataConfig, LoaderConfig
from pipeline.decoding import geometry
from pipeline.decoding.dali import DecodeError, WholeImages
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import square_loader
from pipeline.packing.plan import Ids, PackOptions
from pipeline.reading.quarantine import SampleError
from pipeline.reading.source import ArchiveSource
from pipeline.sampling.batch_plan import Bytes

BATCH = 32  # images decoded together: 6 MB of squares

Pixels = npt.NDArray[np.uint8]


def decoded(index: SampleIndex, split: str, ids: Ids, options: PackOptions, threads: int,
            skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of the samples, in order, as the loaders see them; unreadable ones go into `skipped` instead."""
    if options.region == "full":
        yield from _whole(index, ids, options.square_px, threads, skipped)
        return
    data = DataConfig(region="square", square_px=options.square_px, crop_px=options.square_px, mirror=False, lighting=0,
                      mean="channel")
    machine = LoaderConfig(threads=threads)
    with square_loader(index, split, data, BATCH, None, machine=machine, skip_corrupt=True, ids=ids) as loader:
        for batch in loader:
            skipped.update(loader.skipped)
            yield from zip(batch.ids.tolist(), batch.images.numpy())
        skipped.update(loader.skipped)


def _whole(index: SampleIndex, ids: Ids, short_px: int, threads: int, skipped: dict[int, str]) -> Iterator[tuple[int, Pixels]]:
    """(id, (H, W, 3) uint8) of whole images at a short side of `short_px`, as `decoded`."""
    source, together, alone = ArchiveSource(index), WholeImages(BATCH, threads), None
    for first in range(0, len(ids), BATCH):
        chunk: list[int] = []
        views: list[Bytes] = []
        source.announce(ids[first:first + BATCH])
        for id in ids[first:first + BATCH].tolist():
            try:
                views.append(source.read(id))
                chunk.append(id)
            except SampleError as error:
                skipped[id] = error.reason
        sizes = geometry.sizes(index, np.array(chunk, np.int64))
        resized = geometry.resized(sizes, short_px)
        try:
            if chunk:
                yield from zip(chunk, together.images(views, sizes, resized))
            continue
        except DecodeError:
            pass  # it does not say which one
        alone = alone or WholeImages(1, 1)
        for i, id in enumerate(chunk):
            try:
                yield id, alone.images(views[i:i + 1], sizes[i:i + 1], resized[i:i + 1])[0]
            except DecodeError as error:
                skipped[id] = error.reason


def encode(pixels: Pixels, options: PackOptions) -> bytes:
    """(H, W, 3) uint8 RGB → JPEG, by libjpeg-turbo."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), options.quality, "RGB", options.subsampling))


def encoder() -> str:
    """The libraries that decide the bytes: `simplejpeg 1.9.0, DALI 2.4.0`."""
    return f"simplejpeg {simplejpeg.__version__}, DALI {nvidia.dali.__version__}"


def squared_error(pixels: Pixels, jpeg: bytes) -> int:
    """Sum of squared differences between pixels and their JPEG, grey levels squared; exact."""
    return int(((simplejpeg.decode_jpeg(jpeg, "RGB").astype(np.int64) - pixels) ** 2).sum())


def psnr(error: int, pixels: int) -> float:
    """Peak signal-to-noise ratio in dB of a squared error summed over so many pixels of three channels; at most 100, so that
    equal pixels have a number too."""
    return float(min(10 * np.log10(255 ** 2 * 3 * pixels / max(error, 1e-9)), 100.0))


def check_budget(index: SampleIndex, split: str, skipped: dict[int, str], budget: float) -> None:
    """Raises RuntimeError when a larger share than `budget` of a split's samples is unreadable."""
    if not skipped:
        return
    entry = index.header["splits"][index.split_names.index(split)]
    most = math.ceil(budget * (entry["count"] - entry["excluded"]))
    if len(skipped) > most:
        id, why = next(iter(skipped.items()))
        raise RuntimeError(f"unreadable samples of {split} (={len(skipped)}) must not exceed the budget (={most}); one of "
                           f"them: {index.safe_name(id)} {why}; look with `python tools/build_index.py verify {index.path} "
                           "--scrub`, and raise --budget to leave them out")
