"""What a quality and a subsampling cost on an index: error, bytes, time. How the defaults of tools/pack_shards.py were chosen."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Iterator, Sequence

import numpy as np

from pipeline.packing.jpeg import BATCH, PackOptions, check_budget, decoded, encode, psnr, squared_error
from pipeline.packing.plan import measured_ids, order

if TYPE_CHECKING:
    from pipeline.index.sample_index import SampleIndex

QUALITIES = tuple((quality, subsampling) for quality in (80, 85, 90, 92, 95) for subsampling in ("420", "422", "444"))
_ROUNDS = 3  # the fastest counts: whatever else runs on the machine only makes things slower


@dataclass(frozen=True)
class Cost:
    """One setting: PSNR in dB (mean and least of the images), mean bytes, milliseconds an image on one core."""
    quality: int
    subsampling: str
    psnr_mean: float
    psnr_min: float
    bytes: float
    encode_ms: float
    decode_ms: float


def measure(index: "SampleIndex", split: str, options: PackOptions, settings: Sequence[tuple[int, str]]) -> Iterator[Cost]:
    """The costs of (quality, subsampling) settings, on the images of a split whose PSNR packing measures; DALI decodes.

    Raises RuntimeError when an image is unreadable.
    """
    from pipeline.decoding.dali import SizeProbe

    skipped: dict[int, str] = {}
    ids = np.array(measured_ids(order(index.ids(split), options.seed)), np.int64)
    images = [pixels.copy() for _, pixels in decoded(index, split, ids, options, 1, skipped)]
    check_budget(index, split, skipped, 0)
    probe = SizeProbe(BATCH, 1)
    for quality, subsampling in settings:
        replace(options, quality=quality, subsampling=subsampling)  # checks them
        times: list[tuple[float, float]] = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            files = [encode(pixels, quality, subsampling) for pixels in images]
            middle = time.perf_counter()
            views = [np.frombuffer(file, np.uint8) for file in files]
            for first in range(0, len(views), BATCH):
                probe.sizes(views[first:first + BATCH])
            times.append((middle - began, time.perf_counter() - middle))
        values = [psnr(squared_error(pixels, file), pixels.shape[0] * pixels.shape[1]) for pixels, file in zip(images, files)]
        encode_ms, decode_ms = (min(column) * 1e3 / len(images) for column in zip(*times))
        yield Cost(quality, subsampling, float(np.mean(values)), min(values), float(np.mean([len(file) for file in files])),
                   encode_ms, decode_ms)
