"""The loader when its files are not in memory yet: asks the kernel to forget them, says whether it did, and measures.

The one concept: `posix_fadvise(DONTNEED)` is a wish. tmpfs, some network file systems and pages that are mapped elsewhere stay,
so after it a few places of every file are asked for without waiting (`RWF_NOWAIT`): what comes back was still in memory.
"""
from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.index.sample_index import SampleIndex
from pipeline.loading.train_loader import TrainLoader
from tools.profile.measure import Turns, settle

_PLACES = 16    # of each file that are looked at
_PART = 0.05    # of them that may still be in memory when the files count as forgotten


@dataclass(frozen=True)
class Dropped:
    """How it went: `kept`, the share of the places looked at that are still in memory (None: the file system does not say)."""
    files: int
    bytes: int
    kept: float | None

    @property
    def note(self) -> str:
        """In words."""
        what = f"{self.files} file{'s' * (self.files != 1)}, {self.bytes / 1e6:,.0f} MB"
        if self.kept is None:
            return f"{what} asked to be forgotten; the file system does not say whether it did"
        if self.kept > _PART:
            return (f"the file system keeps {self.kept:.0%} of {what} in memory (another process may have them open); "
                    "this is no cold figure")
        return f"{what} forgotten by the page cache"


def drop(index: SampleIndex, split: str) -> Dropped:
    """Ask the kernel to forget the archives of a split. Nobody may have them mapped: close loaders before."""
    paths = [index.archive_path(position) for position in np.unique(index.samples["archive"][index.ids(split)]).tolist()]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    kept: list[bool] = []
    told, size = True, 0
    for file in files:
        found = _forget(file)
        size += file.stat().st_size
        told = told and found is not None
        kept += found or []
    return Dropped(len(files), size, sum(kept) / len(kept) if told and kept else None)


def _forget(file: Path) -> list[bool] | None:
    """Whether places of the file are still in memory after asking; None when that cannot be told."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages not yet written cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        found = [_in_memory(descriptor, size * place // _PLACES) for place in range(_PLACES)]
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what looking may have fetched
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if None in found else [place is True for place in found]


def _in_memory(descriptor: int, offset: int) -> bool | None:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # not of this file system, or not of this system
        return None
    return True


def cold_pass(make: Callable[[], TrainLoader], index: SampleIndex, split: str, seconds: float, repeats: int) -> tuple[Turns, str]:
    """A fresh loader on forgotten files, from its first batch on, over at most an epoch; its figures, and a note on the dropping.

    The start-up (threads, DALI's first batches) is inside: with a small set it weighs more than the disk.
    """
    turns, note = Turns(), ""
    for _ in range(repeats):
        gc.collect()  # a loader that is closed has its archives mapped for as long as anything refers to it
        settle()
        note = drop(index, split).note
        _pass(make, turns, seconds)
    return turns, f"{note}; start-up included, at most an epoch"


def _pass(make: Callable[[], TrainLoader], turns: Turns, seconds: float) -> None:
    with make() as loader:
        images, cpu, start = 0, time.process_time(), time.perf_counter()
        asked = start
        for batch in loader:
            images += len(batch.ids)
            del batch
            now = time.perf_counter()
            turns.latencies_ms.append((now - asked) * 1e3)
            asked = now
            if now - start > seconds:
                break
        turns.rates.append(images / (asked - start))
        turns.cpu_ms.append((time.process_time() - cpu) / images * 1e3)
        turns.wall_s += asked - start
        turns.add_waits(loader.meter.waits)
