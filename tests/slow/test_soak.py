"""A loader that runs for days must hold constant memory, file handles and threads."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.loaders import train_loader

BATCHES, WARM_UP, LIMIT_MIB = 20_000, 20_000, 4.0  # heaps take that long to settle


@dataclass(frozen=True)
class Holdings:
    """What this process holds: MiB of anonymous memory (mapped archives belong to the page cache), open file handles, threads."""

    memory_mib: float
    handles: int
    threads: int

    @classmethod
    def now(cls) -> Holdings:
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(int(status["RssAnon"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(status["Threads"]))


def soak(index_folder: Path, tier: str, folder: Path, batches: int, warm_up: int) -> list[Holdings]:
    """What is held at eleven moments, the first of them after the warm-up."""
    index = SampleIndex.load(index_folder)
    moments, held = {warm_up + batches * part // 10 for part in range(11)}, []
    machine = LoaderConfig(threads=1, quarantine_budget=0.05, resident_folder=str(folder))
    with train_loader(tier, index, "train", DataConfig("square", 76, 67, True, 0.1, "image"), 8, 0, Stats.for_index(index, 76),
                      machine=machine) as loader:
        while loader.step < warm_up + batches:
            for _ in loader:
                if loader.step in moments:
                    held.append(Holdings.now())
    return held[:11]


@pytest.mark.slow
@pytest.mark.parametrize("tier, batches, warm_up, limit_mib", [
    ("archives", 60, 20, 64.0), *((tier, BATCHES, WARM_UP, LIMIT_MIB) for tier in ("archives", "resident"))])
def test_memory_handles_and_threads_are_constant(tiny_set: TinySet, tmp_path: Path, tier: str, batches: int, warm_up: int,
                                                 limit_mib: float) -> None:
    held = soak(tiny_set.index, tier, tmp_path, batches, warm_up)
    assert max(holdings.memory_mib for holdings in held) - held[0].memory_mib < limit_mib, held
    # The least of three moments: a file that is reopened or a pool made for one damaged image is no leak.
    assert min(one.handles for one in held[-3:]) <= min(one.handles for one in held[:3]), held
    assert min(one.threads for one in held[-3:]) <= min(one.threads for one in held[:3]), held
