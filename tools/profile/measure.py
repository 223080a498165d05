"""Interleaved measuring: workloads take turns, round by round, so that whatever disturbs the machine disturbs all of them alike.

`interleave` is the harness: it calls every workload once a round. `measure` uses it for workloads of this process, each of which
first uses up what was prefetched before the clock starts. CPU time is that of the whole process tree from idle to idle: as many
batches are made in a turn as are taken, since the queues are full before and after it.
"""
from __future__ import annotations

import itertools
import os
import resource
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

_QUIET_S, _QUIET_CPU_S = 0.02, 0.002    # idle: in so many seconds no more CPU seconds, twice in a row
_LEAST_BATCHES = 2                      # of a turn
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


def interleave(workloads: Mapping[str, Callable[[], T]], rounds: int, verbose: bool = False) -> dict[str, list[T]]:
    """Call every workload once a round; each round begins with another one, so that no workload always follows the same one.

    Args:
        workloads: name → a function that takes one turn and returns its result.
        rounds: how many.
        verbose: print each round's number to stderr.

    Returns:
        name → its results, one a round.
    """
    names = list(workloads)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        if verbose:
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        first = number * len(names) // rounds
        for name in [*names[first:], *names[:first]]:
            results[name].append(workloads[name]())
    return results


@dataclass(frozen=True)
class Workload:
    """Something to be measured in this process.

    Attributes:
        name: of it.
        batches: each `next` makes one batch and gives its number of images. Closed by whoever made it.
        warmup: batches taken before the clock of a turn starts: more than are prefetched.
        monitor: of the loader in it, if there is one.
        threads: that do the work.
        image_bytes: mean bytes an image that pass through it; 0 where bytes are not what it is about.
    """
    name: str
    batches: Iterator[int]
    warmup: int = 1
    monitor: Monitor | None = None
    threads: int = 1
    image_bytes: float = 0.0


@dataclass(frozen=True)
class Turn:
    """One turn of a workload.

    Attributes:
        images, seconds: taken, and the wall time.
        cpu_s: CPU seconds of the process tree for these images.
        latency_ms: of each batch.
        waits: stall times that the monitor saw.
        depth: (seconds since the turn began, batches ready in the queue).
        rss_mb: resident memory at the start, at the end, and at most.
    """
    images: int
    seconds: float
    cpu_s: float
    latency_ms: tuple[float, ...] = ()
    waits: Waits = Waits()
    depth: tuple[tuple[float, int], ...] = ()
    rss_mb: tuple[float, float, float] = (0.0, 0.0, 0.0)

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
    """What the rounds of one workload gave: throughput, CPU time, stalls.

    Attributes:
        name, threads, image_bytes: as of `Workload`.
        rates: images/s, one figure a round.
        cpu_ms: CPU ms an image, one figure a round.
        latency_ms: p50, p95, p99 and largest time from asking for a batch to having it.
        waited: stall, the share of the time spent waiting for the loader.
        causes: what the loader was doing meanwhile: state → share of the stall; empty without one.
        depth: (seconds, batches ready) over all turns.
        rss_mb: resident memory before, after, and at most, MB.
    """
    name: str
    rates: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    threads: int = 1
    image_bytes: float = 0.0
    latency_ms: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    waited: float = 0.0
    causes: dict[str, float] = field(default_factory=dict)
    depth: tuple[tuple[float, int], ...] = ()
    rss_mb: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def rate(self) -> float:
        """Median images/s."""
        return statistics.median(self.rates)

    @property
    def cpu(self) -> float:
        """Median CPU ms an image."""
        return statistics.median(self.cpu_ms)

    @property
    def core_rate(self) -> float:
        """Images/s that one core would do if it did nothing else."""
        return 1000 / self.cpu if self.cpu else float("inf")

    @property
    def mb_s(self) -> float:
        """MB/s through it; 0 where bytes are not what it is about."""
        return self.rate * self.image_bytes / 1e6


def measure(workloads: Sequence[Workload], seconds: float, rounds: int) -> dict[str, Figures]:
    """Figures of each workload by its name, from interleaved turns of some seconds.

    Raises:
        ValueError: two workloads of one name.
    """
    if len({workload.name for workload in workloads}) < len(workloads):
        raise ValueError(f"workloads (={[workload.name for workload in workloads]}) must have different names; rename one")
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
    monitor, memory = workload.monitor, rss_mb()
    waits = monitor.waits if monitor else Waits()
    peak, images, latency_ms = memory, 0, []
    now = start = time.perf_counter()
    for count in workload.batches:
        images, asked, now = images + count, now, time.perf_counter()
        latency_ms.append((now - asked) * 1e3)
        peak = max(peak, rss_mb())
        if now - start >= seconds and len(latency_ms) >= _LEAST_BATCHES:
            break
    waits = monitor.waits.since(waits) if monitor else waits
    depth = tuple((at - start, ready) for at, ready in list(monitor.depths) if start <= at <= now) if monitor else ()
    wait_idle()
    cpu = (cpu_seconds(processes) - cpu) * images / (warm + images)
    return Turn(images, now - start, cpu, tuple(latency_ms), waits, depth, (memory, rss_mb(), peak))


def summarize(workload: Workload, turns: Sequence[Turn]) -> Figures:
    """The figures of a workload's turns."""
    seconds = sum(turn.seconds for turn in turns)
    waits = {state: sum(getattr(turn.waits, state) for turn in turns) for state in ("seconds", *STAGES)}
    stalled = sum(waits[state] for state in STAGES)
    low, middle, high = np.percentile([ms for turn in turns for ms in turn.latency_ms], [50, 95, 99]).tolist()
    starts = [0.0, *itertools.accumulate(turn.seconds for turn in turns)]
    return Figures(
        workload.name, tuple(turn.rate for turn in turns), tuple(turn.cpu_ms for turn in turns), workload.threads,
        workload.image_bytes, (low, middle, high, max(max(turn.latency_ms) for turn in turns)),
        min(1.0, waits["seconds"] / seconds), {state: waits[state] / stalled for state in STAGES} if stalled else {},
        tuple((start + at, ready) for start, turn in zip(starts, turns) for at, ready in turn.depth),
        (turns[0].rss_mb[0], turns[-1].rss_mb[1], max(turn.rss_mb[2] for turn in turns)))


# --- what the kernel counts

def process_tree(root: int) -> list[int]:
    """Process ids of `root` and of all that descend from it, by Linux's /proc."""
    pids = [root]
    for pid in pids:    # grows meanwhile
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):     # the thread has ended
                pids += map(int, path.read_text(encoding="ascii").split())
    return pids


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU seconds that living processes have used so far, all their threads."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)    # the clock that clock_getcpuclockid(3) gives for a process
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


def machine_cpu_s() -> float:
    """Seconds all cores of the machine have worked since it started, for whatever program; 0 where that is not told."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, stolen = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")


def rss_mb() -> float:
    """Resident memory of this process, MB; mapped archives count as far as they were read."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no /proc: the largest so far is what every Unix tells
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return pages * resource.getpagesize() / 1e6
