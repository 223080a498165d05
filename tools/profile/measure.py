"""Interleaved measuring: workloads take turns, round by round, so that whatever disturbs the machine disturbs all of them alike.

A turn first uses up what was prefetched before the clock starts. CPU time is that of the whole process tree from idle to idle: as
many batches are made in a turn as are taken, since the queues are full before and after it.
"""
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.monitor import STAGES, Monitor, Waits

_QUIET_S, _QUIET_CPU_S = 0.02, 0.002  # idle: in so many seconds no more CPU seconds, twice in a row
_LEAST_BATCHES = 2  # of a turn
T = TypeVar("T")


class Spread(NamedTuple):
    """Median, smallest and largest of the rounds."""
    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of some figures, one a round."""
    return Spread(statistics.median(values), min(values), max(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Spread of the ratios within each round, whose two figures were taken within a minute of each other."""
    return spread([above / below for above, below in zip(over, under)])


def interleave(workloads: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each workload, called once a round, returned. Each round begins with another one, so that no workload always follows
    the same one."""
    names = list(workloads)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        first = number * len(names) // rounds
        for name in [*names[first:], *names[:first]]:
            results[name].append(workloads[name]())
    return results


@dataclass(frozen=True)
class Workload:
    """Something to be measured in this process."""
    name: str
    batches: Iterator[int]  # each `next` makes one batch and gives its number of images; closed by whoever made it
    warmup: int = 1  # batches taken before the clock of a turn starts: more than are prefetched
    monitor: Monitor | None = None  # of the loader in it, if there is one
    threads: int = 1  # that do the work
    image_bytes: float = 0.0  # mean bytes an image that pass through it; 0 where bytes are not what it is about


@dataclass(frozen=True)
class Turn:
    """One turn of a workload."""
    images: int
    seconds: float
    cpu_s: float  # of the process tree, for these images
    latency_ms: tuple[float, ...] = ()  # of each batch
    waits: Waits = Waits()  # stalls that the monitor saw

    @property
    def rate(self) -> float:
        """Images/s."""
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU ms an image."""
        return 1e3 * self.cpu_s / self.images


@dataclass(frozen=True)
class Figures:
    """What the rounds of one workload gave: throughput, CPU time, stalls. Rates and CPU times are one figure a round."""
    name: str
    rates: tuple[float, ...]  # images/s
    cpu_ms: tuple[float, ...]  # an image
    threads: int = 1
    image_bytes: float = 0.0
    latency_ms: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # until a batch is there: p50, p95, p99, largest
    waited: float = 0.0  # stall: share of the time spent waiting for the loader
    causes: dict[str, float] = field(default_factory=dict)  # stage the loader was in meanwhile → share of the stall

    @property
    def rate(self) -> float:
        """Median images/s."""
        return statistics.median(self.rates)

    @property
    def cpu(self) -> float:
        """Median CPU ms an image."""
        return statistics.median(self.cpu_ms)

    @property
    def mb_s(self) -> float:
        """MB/s through it; 0 where bytes are not what it is about."""
        return self.rate * self.image_bytes / 1e6


def measure(workloads: Sequence[Workload], seconds: float, rounds: int) -> dict[str, Figures]:
    """Figures of each workload by its name, from interleaved turns of some seconds."""
    for workload in workloads:
        next(workload.batches)  # starts its threads and queues
    turns = interleave({workload.name: partial(run_turn, workload, seconds) for workload in workloads}, rounds)
    return {workload.name: summarize(workload, turns[workload.name]) for workload in workloads}


def run_turn(workload: Workload, seconds: float) -> Turn:
    """Use up the warm-up, then take batches for some seconds, at least two (fewer only when there are no more)."""
    wait_idle()
    processes = process_tree(os.getpid())
    cpu = cpu_seconds(processes)
    warm = sum(itertools.islice(workload.batches, workload.warmup))
    waits = workload.monitor.waits if workload.monitor else Waits()
    images, latency_ms = 0, []
    now = start = time.perf_counter()
    for count in workload.batches:
        images, asked, now = images + count, now, time.perf_counter()
        latency_ms.append((now - asked) * 1e3)
        if now - start >= seconds and len(latency_ms) >= _LEAST_BATCHES:
            break
    waits = workload.monitor.waits.since(waits) if workload.monitor else waits
    wait_idle()
    cpu = (cpu_seconds(processes) - cpu) * images / (warm + images)
    return Turn(images, now - start, cpu, tuple(latency_ms), waits)


def summarize(workload: Workload, turns: Sequence[Turn]) -> Figures:
    """The figures of a workload's turns."""
    waits = {stage: sum(getattr(turn.waits, stage) for turn in turns) for stage in ("seconds", *STAGES)}
    stalled = sum(waits[stage] for stage in STAGES)
    p50, p95, p99, most = np.percentile([ms for turn in turns for ms in turn.latency_ms], [50, 95, 99, 100]).tolist()
    return Figures(workload.name, tuple(turn.rate for turn in turns), tuple(turn.cpu_ms for turn in turns), workload.threads,
                   workload.image_bytes, (p50, p95, p99, most), min(1.0, waits["seconds"] / sum(turn.seconds for turn in turns)),
                   {stage: waits[stage] / stalled for stage in STAGES} if stalled else {})


# --- what the kernel counts

def process_tree(root: int) -> list[int]:
    """Process ids of `root` and of all that descend from it, by Linux's /proc."""
    pids = [root]
    for pid in pids:  # grows meanwhile
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):  # the thread has ended
                pids += map(int, path.read_text(encoding="ascii").split())
    return pids


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds that living processes have used so far, all their threads."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) gives for a process
    return total


def wait_idle(limit_s: float = 5.0) -> bool:
    """Wait until this process and its children use no CPU: the queues are full. False when they still do after the limit."""
    end, quiet = time.perf_counter() + limit_s, 0
    while quiet < 2 and time.perf_counter() < end:  # twice: once may be another program that has the cores
        processes = process_tree(os.getpid())
        before = cpu_seconds(processes)
        time.sleep(_QUIET_S)
        quiet = quiet + 1 if cpu_seconds(processes) - before < _QUIET_CPU_S else 0
    return quiet == 2
