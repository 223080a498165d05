"""Decodes every image of an index strictly and wholly once, with DALI on the CPU, to find those that do not decode.

Training decodes only the region under a crop, which passes over a file cut below it; hence this strict pass. DALI names
no sample in an error it can be trusted for, and loses the batch; the batch is then run again one image at a time.
"""

from __future__ import annotations

import numpy as np

from pipeline.decoding.dali import DecodeError, WholeImages
from pipeline.index.sample_index import SampleIndex
from pipeline.parallel import Progress, Silent
from pipeline.index.verify import Finding

BATCH = 64
_BATCH_PIXELS = 64_000_000  # 200 MB decoded; larger batches are cut


def scrub(index: SampleIndex, threads: int, progress: Progress | None = None) -> list[Finding]:
    """Decode all images that are not excluded, in the order they lie on disk; those that fail or come out in another
    size than the index says."""
    progress = progress or Silent()
    samples = index.samples
    ids = np.flatnonzero(samples["excluded"] == 0)
    ids = ids[np.lexsort((samples["offset"][ids], samples["archive"][ids]))]
    progress.expect("decoding", int(samples["size"][ids].sum(dtype=np.int64)))
    many, one = WholeImages(BATCH, threads), None
    found: list[Finding] = []
    for chunk in _batches(index, ids):
        data, kept = [], []
        for id in chunk:
            try:
                data.append(np.frombuffer(index.read(id), np.uint8))
                kept.append(id)
            except (ValueError, OSError) as error:
                found.append(Finding(id, index.safe_name(id), str(error)))
        if kept and _problem(many, data, index, kept) is not None:
            one = one or WholeImages(1, 1)
            for id, bytes in zip(kept, data):
                problem = _problem(one, [bytes], index, [id])
                if problem is not None:
                    found.append(Finding(id, index.safe_name(id), problem))
        progress.advance(len(chunk), int(samples["size"][chunk].sum(dtype=np.int64)))
    return found


def _batches(index: SampleIndex, ids: np.ndarray) -> list[list[int]]:
    pixels = (index.samples["width"][ids].astype(np.int64) * index.samples["height"][ids]).tolist()
    batches: list[list[int]] = []
    held = 0
    for id, count in zip(ids.tolist(), pixels):
        if not batches or len(batches[-1]) == BATCH or held + count > _BATCH_PIXELS:
            batches.append([])
            held = 0
        batches[-1].append(id)
        held += count
    return batches


def _problem(probe: WholeImages, data: list[np.ndarray], index: SampleIndex, ids: list[int]) -> str | None:
    """What is wrong with a batch; None when every image decodes to the size the index says."""
    try:
        sizes = probe.sizes(data)
    except DecodeError as error:
        return error.reason
    for id, (height, width) in zip(ids, sizes):
        row = index.samples[id]
        if (height, width) != (row["height"], row["width"]):
            return f"decodes to {width}×{height}, the index says {row['width']}×{row['height']}"
    return None
