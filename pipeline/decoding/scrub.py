"""Find corrupt images of an index by decoding every one of them completely, with DALI on the CPU.

Training decodes only the region under a crop, which passes over a file cut below it; hence this strict pass. DALI names no
sample in an error it can be trusted for, and loses the batch; the batch is then run again one image at a time."""
from __future__ import annotations

import numpy as np

from pipeline.decoding.dali import DecodeError, WholeImages
from pipeline.index.sample_index import SampleIndex
from pipeline.process_pool import Progress
from pipeline.index.verify import Finding

BATCH = 64
_BATCH_PIXELS = 64_000_000  # 200 MB decoded; larger batches are cut


def scrub(index: SampleIndex, threads: int, progress: Progress = Progress()) -> list[Finding]:
    """Decode all images that are not excluded, in the order they lie on disk; those that fail or come out in another size than
    the index says."""
    samples = index.samples
    ids = np.flatnonzero(samples["excluded"] == 0)
    ids = ids[np.lexsort((samples["offset"][ids], samples["archive"][ids]))]
    progress.expect("decoding", int(samples["size"][ids].sum(dtype=np.int64)))
    together, alone = WholeImages(BATCH, threads), None
    findings: list[Finding] = []
    for batch in _batches(index, ids):
        data: dict[int, np.ndarray] = {}
        for id in batch:
            try:
                data[id] = np.frombuffer(index.read(id), np.uint8)
            except (ValueError, OSError) as error:
                findings.append(Finding(id, index.safe_name(id), str(error)))
        if data and _problem(together, index, data):
            alone = alone or WholeImages(1, 1)
            for id, encoded in data.items():
                if problem := _problem(alone, index, {id: encoded}):
                    findings.append(Finding(id, index.safe_name(id), problem))
        progress.advance(len(batch), int(samples["size"][batch].sum(dtype=np.int64)))
    return findings


def _batches(index: SampleIndex, ids: np.ndarray) -> list[list[int]]:
    pixels = (index.samples["width"][ids].astype(np.int64) * index.samples["height"][ids]).tolist()
    batches: list[list[int]] = []
    total = 0
    for id, count in zip(ids.tolist(), pixels):
        if not batches or len(batches[-1]) == BATCH or total + count > _BATCH_PIXELS:
            batches.append([])
            total = 0
        batches[-1].append(id)
        total += count
    return batches


def _problem(probe: WholeImages, index: SampleIndex, data: dict[int, np.ndarray]) -> str:
    """What is wrong with a batch, id → encoded image; "" when every image decodes to the size the index says."""
    try:
        sizes = probe.sizes(list(data.values()))
    except DecodeError as error:
        return error.reason
    for id, (height, width) in zip(data, sizes):
        row = index.samples[id]
        if (height, width) != (row["height"], row["width"]):
            return f"decodes to {width}×{height}, the index says {row['width']}×{row['height']}"
    return ""
