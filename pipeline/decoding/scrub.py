"""Find corrupt images of an index: compare the CRC-32 of every one, and decode it completely, on the CPU.

Training decodes only the region under a crop, which passes over a file cut below it; hence this strict pass. libjpeg's warnings
count as damage: where it says "premature end of data segment" or "extraneous bytes before marker", the pixels are not those
that were encoded. Then DALI decodes what libjpeg accepts. It names no sample in an error it can be trusted for, and loses the
batch; the batch is then run again one image at a time."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg

from pipeline.decoding.dali import DecodeError, WholeImages
from pipeline.index.sample_index import FORMATS, DamagedBytes, SampleIndex
from pipeline.process_pool import Progress
from pipeline.index.verify import Finding, check_bytes

BATCH = 64
_BATCH_PIXELS = 64_000_000  # 200 MB decoded; larger batches are cut


def scrub(index: SampleIndex, threads: int, progress: Progress = Progress()) -> list[Finding]:
    """Decode all images that are not excluded, in the order they lie on disk; those that are not as indexed, fail, are decoded
    with a warning, or come out in another size than the index says.

    Raises OSError or ValueError when one cannot be read now, MemoryError when memory does not suffice: neither is damage.
    """
    samples = index.samples
    ids = np.flatnonzero(samples["excluded"] == 0)
    ids = ids[np.lexsort((samples["offset"][ids], samples["archive"][ids]))]
    progress.expect("decoding", int(samples["size"][ids].sum(dtype=np.int64)))
    together, alone = WholeImages(BATCH, threads), None
    problems: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(index, ids):
            data: dict[int, bytes] = {}
            for id in batch:
                try:
                    data[id] = index.read(id)
                except DamagedBytes as error:
                    problems[id] = str(error)
            found = pool.map(lambda id: _strict(index, id, data[id]), list(data))
            problems |= {id: problem for id, problem in zip(list(data), found) if problem}
            arrays = {id: memoryview(encoded) for id, encoded in data.items() if id not in problems}
            if arrays and _problem(together, index, arrays):
                alone = alone or WholeImages(1, 1)
                each = {id: _problem(alone, index, {id: encoded}) for id, encoded in arrays.items()}
                problems |= {id: problem for id, problem in each.items() if problem}
            progress.advance(len(batch), int(samples["size"][batch].sum(dtype=np.int64)))
    return [Finding(id, index.safe_name(id), problem) for id, problem in sorted(problems.items())]


def _strict(index: SampleIndex, id: int, data: bytes) -> str:
    """What is wrong with the bytes of a sample by its row, and for libjpeg, whose warnings count; "" when nothing is."""
    if problem := check_bytes(index, id, data, bool(index.header["crc32"])):
        return problem
    if index.samples["format"][id] != FORMATS.index("jpeg"):
        return ""
    try:
        space = simplejpeg.decode_jpeg_header(data)[2]
        simplejpeg.decode_jpeg(data, "CMYK" if space in ("CMYK", "YCCK") else "GRAY")  # "GRAY": quick, and reads all data as well
    except ValueError as error:
        if "Could not determine subsampling" not in str(error):  # TurboJPEG's interface lacks some that libjpeg has
            return f"cannot be decoded ({error})"
    return ""


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


def _problem(probe: WholeImages, index: SampleIndex, data: dict[int, memoryview]) -> str:
    """What is wrong with a batch, id → encoded image; "" when every image decodes to the size the index says. Raises
    MemoryError."""
    try:
        sizes = probe.sizes(list(data.values()))
    except DecodeError as error:
        if any(word in str(error).lower() for word in ("alloc", "memory")):
            raise MemoryError(error.reason) from error
        return error.reason
    for id, (height, width) in zip(data, sizes):
        row = index.samples[id]
        if (height, width) != (row["height"], row["width"]):
            return f"decodes to {width}×{height}, the index says {row['width']}×{row['height']}"
    return ""
