"""Checks archives against an index: quick (a sample of rows) or full (every header and CRC-32).

A `Finding` names what is damaged; `exclude` marks such samples excluded in the index. Only bytes that were read are damaged: what
cannot be opened or read now is an error, which ends the check. `pipeline.decoding.scrub` decodes every image besides.
"""
import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.files import difference
from pipeline.index.folders import folder_archive, list_folder
from pipeline.index.image_header import FORMAT_CODE, probe
from pipeline.index.sample_index import REASONS, DamagedBytes, SampleIndex
from pipeline.index.tar import BLOCK, ArchiveError, ByteWindow, fingerprint, read_member
from pipeline.index.writer import mark_excluded
from pipeline.process_pool import Progress, in_processes

SAMPLED = 1000  # rows whose headers the quick check reads
_CHUNK_BYTES = 64 << 20  # of one task of the full check


class Finding(NamedTuple):
    """Something damaged: sample `id`, or an archive or the index itself when id is None."""
    id: int | None
    name: str
    problem: str


def check_files(index: SampleIndex) -> list[Finding]:
    """The index's arrays against their SHA-256, which a load does not always do, and every archive's size and fingerprint. Raises
    ValueError when an archive is not there, OSError."""
    findings = []
    for array in filter(None, (index.files.samples, index.files.names)):
        if problem := difference(index.path / array.file, vars(array)):
            findings.append(Finding(None, str(index.path / array.file), f"{problem}; build the index again"))
    for position, archive in enumerate(index.archives):
        path = index.find_archive(position)
        if archive.is_folder:
            folder = folder_archive(path, list_folder(path)[0])
            size, mark = folder.size, folder.fingerprint
        else:
            size, mark = path.stat().st_size, fingerprint(path)
        if size != archive.size:
            findings.append(Finding(None, str(path), f"has {size} bytes, had {archive.size} when it was indexed"))
        elif mark != archive.fingerprint:
            findings.append(Finding(None, str(path), "has another fingerprint than when it was indexed"))
    return findings


def quick(index: SampleIndex) -> list[Finding]:
    """`check_files`, then the headers of up to SAMPLED rows spread over the index."""
    findings, ids = check_files(index), _not_damaged(index)
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(SAMPLED, len(ids))).astype(np.int64))]
    for chunk in _chunks(index, ids):
        findings += check_rows(index, chunk, False)
    return findings


def full(index: SampleIndex, jobs: int, progress: Progress = Progress()) -> list[Finding]:
    """`check_files`, then tar header, image header and CRC-32 of every row; those marked damaged before are left out.

    Raises ValueError when the index was built without CRC-32.
    """
    if not index.header["crc32"]:
        raise ValueError(f"index (={index.path}) holds no CRC-32 to check (built with --no-crc); build it again "
                         f"without --no-crc, or use --scrub")
    findings, ids = check_files(index), _not_damaged(index)
    sizes, chunks = index.samples["size"].astype(np.int64), list(_chunks(index, ids))
    progress.expect("checking", int(sizes[ids].sum()))
    for chunk, result in zip(chunks, in_processes(check_rows, [(index, chunk, True) for chunk in chunks], jobs), strict=True):
        progress.advance(len(chunk), int(sizes[chunk].sum()))
        findings += result
    return findings


def exclude(index: SampleIndex, findings: Sequence[Finding]) -> int:
    """Mark the samples found damaged excluded, atomically. Returns how many were not excluded before.

    Raises ValueError when a tar differs, before or after the check: that would throw away good samples. A folder of images always
    differs when one of its files does. Raises OSError when by now an archive cannot be read.
    """
    folders = {str(index.find_archive(position)) for position, archive in enumerate(index.archives) if archive.is_folder}
    for finding in (*findings, *check_files(index)):
        if finding.id is None and finding.name not in folders:
            raise ValueError(f"{finding.name} {finding.problem}, so nothing was excluded; restore it first, or build the "
                             f"index again")
    fresh = {finding.id: (finding.name, finding.problem) for finding in findings
             if finding.id is not None and not index.samples["excluded"][finding.id]}
    if fresh:
        mark_excluded(index, fresh)
    return len(fresh)


def left_out(index: SampleIndex, scrub: bool) -> int:
    """How many samples a full check, or a scrub, passes over: those found damaged before, or all that are excluded."""
    return int(index.samples["excluded"].sum()) if scrub else len(index) - len(_not_damaged(index))


def _not_damaged(index: SampleIndex) -> np.ndarray:
    return np.flatnonzero(index.samples["reason"] != REASONS.index("damaged"))


def _chunks(index: SampleIndex, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Rows by archive and position in it, in chunks of about _CHUNK_BYTES of one archive."""
    samples = index.samples
    ids = ids[np.lexsort((samples["offset"][ids], samples["archive"][ids]))]
    sizes = np.cumsum(samples["size"][ids], dtype=np.int64)
    key = samples["archive"][ids].astype(np.int64) * (1 << 32) + sizes // _CHUNK_BYTES
    return filter(len, np.split(ids, np.flatnonzero(np.diff(key)) + 1))


def check_rows(index: SampleIndex, ids: np.ndarray, crc: bool) -> list[Finding]:
    """What is wrong with rows `ids` of one archive, by their headers, and their CRC-32 if `crc`."""
    if not len(ids):
        return []
    position = int(index.samples["archive"][ids[0]])
    is_folder = index.archives[position].is_folder
    source = None if is_folder else ByteWindow(index.find_archive(position), 1 << 20 if crc else 16 << 10)
    with source or contextlib.nullcontext():
        problems = [(id, _check_row(index, id, source, crc)) for id in ids.tolist()]
    return [Finding(id, index.safe_name(id), problem) for id, problem in problems if problem]


def _check_row(index: SampleIndex, id: int, source: ByteWindow | None, crc: bool) -> str:
    """What is wrong with a row; "" when nothing is."""
    row = index.samples[id]
    size = int(row["size"])
    try:
        if source is None:
            data = index.read(id)
        else:
            member = read_member(source, int(row["offset"]) - BLOCK * int(row["header_blocks"]))
            if (member.offset, member.size) != (int(row["offset"]), size):
                return f"its header gives {member.size} bytes at {member.offset}, the index {size} at {row['offset']}"
            data = source.at(member.offset, size)
    except ArchiveError as error:
        return f"its tar header is damaged: {error}"
    except DamagedBytes as error:
        return str(error)
    if len(data) != size:
        return f"has {len(data)} bytes, the index says {size}"
    return check_bytes(index, id, data, crc)


def check_bytes(index: SampleIndex, id: int, data: bytes, crc: bool) -> str:
    """What is wrong with the bytes of a sample, by its CRC-32 (if `crc`) and its header; "" when nothing is."""
    row = index.samples[id]
    if crc and crc32(data) != row["crc32"]:
        return f"has CRC-32 {crc32(data):08x}, the index says {row['crc32']:08x}"
    info = probe(data, True)
    if (FORMAT_CODE[info.format], *info[1:4]) != tuple(row[["format", "width", "height", "channels"]]):
        return f"its header says {info.format} {info.width}×{info.height}, not what the index says"
    return ""
