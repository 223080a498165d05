"""The loader cut off after one of its stages: everything before it runs at once, as always, and its outputs are thrown away."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from pipeline.config import LoaderConfig
from pipeline.loading.train_loader import TrainLoader
from pipeline.sampling.batch_plan import BatchPlan
from tools.profile.measure import Workload
from tools.profile.stages import arrived, image_bytes, touch

_ENDS = {"read": "read", "crc": "read", "decode": "decode", "normalize": "normalize"}  # stage of a profile → of a chain


def cut_off(make: Callable[[LoaderConfig], TrainLoader], machine: LoaderConfig, stages: list[str],
            closers: ExitStack) -> list[Workload]:
    """The loader cut off after each of these stages that its chain can end after (on a CPU what resizes is the normalizer's
    threads); nothing for tier resident, whose stages follow one another in one thread.

    Args:
        make: opens the loader with these settings; closed by `closers`.
    """
    works = []
    for stage in stages:
        if stage not in _ENDS:
            continue
        loader = closers.enter_context(make(replace(machine, check_crc=machine.check_crc and stage != "read")))
        if "read" not in loader.chain.stages:
            return []
        threads = max(1, machine.read_threads) if _ENDS[stage] == "read" else loader.threads
        works.append(Workload(stage, _through(loader, _ENDS[stage], closers), machine.prefetch + machine.read_threads + 3, None,
                              threads))
    return works


def read_alone(make: Callable[[LoaderConfig], TrainLoader], machine: LoaderConfig, closers: ExitStack) -> list[Workload]:
    """Reading as a stage of tier streamed: in its order, the drawing of that order included."""
    loader = closers.enter_context(make(replace(machine, check_crc=False)))
    reading = max(1, machine.read_threads)
    return [Workload("read", _through(loader, "read", closers), machine.read_threads + 2, None, reading, image_bytes(loader))]


def _through(loader: TrainLoader, stage: str, closers: ExitStack) -> Iterator[int]:
    """Batches of a loader that ends after the stage of its chain, without end."""
    return map(lambda made: _count(loader, made), closers.enter_context(closing(
        loader.chain.until(stage, range(0, sys.maxsize)))))


def _count(loader: TrainLoader, made: Any) -> int:
    """Images of what a stage made, once it is there."""
    arrived(loader.device)
    if isinstance(made, BatchPlan) and not loader.machine.check_crc:  # then nobody has yet
        for view in made.encoded:
            touch(view)
    return len((made[0] if isinstance(made, tuple) else made).ids)
