"""The loader on files that are not in the page cache: asks the kernel to drop them, checks whether it did, and measures.

`posix_fadvise(DONTNEED)` is a wish: tmpfs, some network file systems and pages that are mapped elsewhere stay in memory. So after
it a few offsets of every file are read without waiting (`RWF_NOWAIT`): what comes back was still cached.
"""
from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from tools.profile.measure import Figures, Turn, Workload, run_turn, summarize

_PROBES = 16        # offsets of each file that are looked at
_CACHED = 0.05      # share of them that may still be cached when the files count as dropped


@dataclass(frozen=True)
class Dropped:
    """Files that were dropped from the page cache. `kept`: share of the probes still cached; None where that cannot be told."""
    files: int
    bytes: int
    kept: float | None

    @property
    def note(self) -> str:
        """In words."""
        size = f"{self.files} file{'s' * (self.files != 1)}, {self.bytes / 1e6:,.0f} MB"
        if self.kept is None:
            return f"asked the kernel to drop {size}; the file system does not say whether it did"
        if self.kept > _CACHED:
            return (f"the file system keeps {self.kept:.0%} of {size} in memory (another process may have them open); "
                    "this is no cold figure")
        return f"{size} dropped from the page cache"


def drop(index: SampleIndex, split: str) -> Dropped:
    """Drop the archives of a split from the page cache. Nobody may have them mapped: close loaders before."""
    paths = [index.archive_path(archive) for archive in np.unique(index.samples["archive"][index.ids(split)]).tolist()]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    cached = [_drop(file) for file in files]
    known = [probe for probes in cached for probe in probes]
    return Dropped(len(files), sum(file.stat().st_size for file in files),
                   None if None in known or not known else sum(map(bool, known)) / len(known))


def _drop(file: Path) -> list[bool | None]:
    """Whether each probe of the file is still cached after asking; [None] when the file system refuses."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        cached = [_cached(descriptor, size * probe // _PROBES) for probe in range(_PROBES)]
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what looking may have fetched
        return cached
    except OSError:
        return [None]
    finally:
        os.close(descriptor)


def _cached(descriptor: int, offset: int) -> bool | None:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # not of this file system, or not of this system
        return None
    return True


def measure_cold(make: Callable[[], TrainLoader], index: SampleIndex, split: str, seconds: float,
                 rounds: int) -> tuple[Figures, str]:
    """Figures of a fresh loader on dropped files, from its first batch on, over at most an epoch; and a note on the dropping.

    The start-up (threads, DALI's first batches) is included: with a small set it weighs more than the disk.
    """
    turns, note = [], ""
    for _ in range(rounds):
        gc.collect()  # a closed loader has its archives mapped for as long as anything refers to it
        note = drop(index, split).note
        turns.append(_first_pass(make, seconds))
    return summarize(Workload("cold", iter(())), turns), f"{note}; start-up included, at most an epoch"


def _first_pass(make: Callable[[], TrainLoader], seconds: float) -> Turn:
    with make() as loader:
        return run_turn(Workload("cold", (len(batch.ids) for batch in loader), 0, loader.monitor), seconds)
