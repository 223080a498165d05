"""Decodes every image of an index strictly and wholly once, with DALI on the CPU, to find those that do not decode.

Training decodes only the region under a crop, which passes over a file cut below it; hence this strict pass. DALI names
no sample in an error it can be trusted for, and loses the batch; the batch is then run again one image at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.index import SampleIndex
from pipeline.parallel import Progress, Silent
from pipeline.verify import Finding, safe_name

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
    many, one = _pipeline(BATCH, threads), None
    found: list[Finding] = []
    for chunk in _batches(index, ids):
        data, kept = [], []
        for id in chunk:
            try:
                data.append(np.frombuffer(index.read(id), np.uint8))
                kept.append(id)
            except (ValueError, OSError) as error:
                found.append(Finding(id, safe_name(index, id), str(error)))
        if kept and _problem(many, data, index, kept) is not None:
            one = one or _pipeline(1, 1)
            for id, bytes in zip(kept, data):
                problem = _problem(one, [bytes], index, [id])
                if problem is not None:
                    found.append(Finding(id, safe_name(index, id), problem))
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


def _pipeline(batch: int, threads: int) -> Any:
    from nvidia.dali import fn, pipeline_def, types  # lazily: a second; verify is the only user

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def decode() -> Any:
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
        return images.shape()

    pipeline = decode()
    pipeline.build()
    return pipeline


def _problem(pipeline: Any, data: list[np.ndarray], index: SampleIndex, ids: list[int]) -> str | None:
    """What is wrong with a batch; None when every image decodes to the size the index says."""
    try:
        pipeline.feed_input("jpegs", data)
        (shapes,) = pipeline.run()
        sizes = [tuple(int(n) for n in np.asarray(shapes.at(i))[:2]) for i in range(len(data))]
    except RuntimeError as error:
        return _reason(error)
    for id, (height, width) in zip(ids, sizes):
        if (height, width) != (index.samples["height"][id], index.samples["width"][id]):
            return f"decodes to {width}×{height}, the index says " \
                   f"{index.samples['width'][id]}×{index.samples['height'][id]}"
    return None


def _reason(error: RuntimeError) -> str:
    """The line of a DALI error that says what happened, without the place in our code."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    # DALI counts samples within its batch, which is no name of ours.
    said = lines[0] if lines and not lines[0].startswith(("Current pipeline", "Failed to decode sample")) else ""
    return "does not decode" + (f": {said}" if said else "")
