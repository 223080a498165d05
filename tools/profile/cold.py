"""The loader on files that are not in the page cache.

`posix_fadvise(DONTNEED)` is a wish: tmpfs, some network file systems and pages that are mapped elsewhere stay in memory. So after
it a few offsets of every file are read without waiting (`RWF_NOWAIT`): what comes back was still cached.
"""
import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from tools.profile.measure import Figures, Workload, run_turn, summarize

_PROBES = 16  # offsets of each file that are looked at
_CACHED = 0.05  # share of them that may still be cached when the files count as dropped


def drop(index: SampleIndex, split: str) -> str:
    """Drop the archives of a split from the page cache; returns in words whether the kernel did. Close loaders before: nobody may
    have the archives mapped."""
    paths = [index.archive_path(archive) for archive in np.unique(index.samples["archive"][index.ids(split)]).tolist()]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    size = f"{len(files)} file{'s' * (len(files) != 1)}, {sum(file.stat().st_size for file in files) / 1e6:,.0f} MB"
    try:
        kept = float(np.mean([probe for file in files for probe in _drop(file)]))
    except OSError:
        return f"asked the kernel to drop {size}; the file system does not say whether it did"
    if kept > _CACHED:
        return (f"the file system keeps {kept:.0%} of {size} in memory (another process may have them open); this is no cold "
                "figure")
    return f"{size} dropped from the page cache"


def _drop(file: Path) -> list[bool]:
    """Whether each probe of the file is still cached after asking. Raises OSError where the file system cannot tell."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        cached = [_cached(descriptor, size * probe // _PROBES) for probe in range(_PROBES)]
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what looking may have fetched
        return cached
    finally:
        os.close(descriptor)


def _cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def measure_cold(make: Callable[[], TrainLoader], index: SampleIndex, split: str, seconds: float,
                 rounds: int) -> tuple[Figures, str]:
    """Figures of a fresh loader on dropped files, from its first batch on, over at most an epoch; and a note on the dropping.

    The start-up (threads, DALI's first batches) is included: with a small set it weighs more than the disk.
    """
    turns, note = [], ""
    for _ in range(rounds):
        gc.collect()  # a closed loader has its archives mapped for as long as anything refers to it
        note = drop(index, split)
        with make() as loader:
            turns.append(run_turn(Workload("cold", (len(batch.ids) for batch in loader), 0, loader.monitor), seconds))
    return summarize(Workload("cold", iter(())), turns), f"{note}; start-up included, at most an epoch"
