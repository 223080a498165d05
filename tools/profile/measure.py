"""Measuring several things fairly: they take turns, so that whatever disturbs the machine disturbs all of them alike.

The one concept: a `Work` does one piece (a batch) each time it is asked; `take_turns` lets every work run for a while, again
and again, and keeps a figure of each turn. The clock starts when what was made ahead is used up. CPU time is the whole process's,
of all its threads, from rest to rest: what is ahead when a turn begins is made ahead again when it ends, so that as many
pieces were made as were taken.
"""
from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.monitor import STATES, Meter, Waits

_QUIET_S, _QUIET_CPU_S, _SETTLE_S = 0.02, 0.002, 5.0


@dataclass(frozen=True)
class Work:
    """Something to be measured.

    Attributes:
        name: of it.
        steps: each `next` does one piece of work and says how many images that were. Closed by whoever made it.
        warm: pieces done before the clock of a turn starts: more than are made ahead.
        meter: of the loader in it, if there is one.
        threads: that do it.
        image_bytes: mean bytes an image, where bytes are what it is about.
    """
    name: str
    steps: Iterator[int]
    warm: int = 1
    meter: Meter | None = None
    threads: int = 1
    image_bytes: float = 0.0


@dataclass
class Turns:
    """What the turns of one work gave.

    Attributes:
        rates: images/s, one a turn.
        cpu_ms: CPU ms an image, one a turn.
        latencies_ms: of every piece of every turn.
        wall_s: of all turns.
        waits: of the meter, over all turns.
        depth: (seconds since the first turn began, batches ready).
        rss_mb: resident memory at the start of the first turn, at the end of the last, and at most.
    """
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    waits: Waits = Waits()
    depth: list[tuple[float, int]] = field(default_factory=list)
    rss_mb: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def add_waits(self, more: Waits) -> None:
        """Count what a meter saw during a turn."""
        self.waits = Waits(*(getattr(self.waits, name) + getattr(more, name) for name in ("seconds", *STATES, "batches")))

    def percentiles_ms(self) -> tuple[float, float, float, float]:
        """p50, p95, p99 and largest latency."""
        low, middle, high = (float(value) for value in np.percentile(self.latencies_ms, [50, 95, 99]))
        return low, middle, high, max(self.latencies_ms)

    @property
    def waited(self) -> float:
        """Share of the time spent waiting for the producing side."""
        return min(1.0, self.waits.seconds / self.wall_s) if self.wall_s else 0.0

    def causes(self) -> dict[str, float]:
        """What the producing side did meanwhile: state → share of the waiting."""
        total = sum(getattr(self.waits, state) for state in STATES)
        return {state: getattr(self.waits, state) / total for state in STATES} if total else {}


def take_turns(works: Sequence[Work], seconds: float, repeats: int) -> dict[str, Turns]:
    """Let each work run for `seconds`, `repeats` times in turn; name → its figures. A turn has at least two pieces.

    Raises:
        ValueError: two works of one name.
    """
    if len({work.name for work in works}) < len(works):
        raise ValueError(f"works (={[work.name for work in works]}) must have different names; rename one")
    found = {work.name: Turns() for work in works}
    for work in works:
        next(work.steps)  # whatever it starts at its first piece is started
    for _ in range(repeats):
        for work in works:
            settle()
            cpu = time.process_time()
            images = sum(next(work.steps) for _ in range(work.warm)) + _turn(work, found[work.name], seconds)
            settle()
            found[work.name].cpu_ms.append((time.process_time() - cpu) / images * 1e3)
    return found


def _turn(work: Work, turns: Turns, seconds: float) -> int:
    """One turn against the clock; the images that were taken."""
    before = work.meter.waits if work.meter else Waits()
    memory = rss_mb()
    peak, images, pieces = memory, 0, 0
    now = start = time.perf_counter()
    while now - start < seconds or pieces < 2:
        images += next(work.steps)
        pieces, asked, now = pieces + 1, now, time.perf_counter()
        turns.latencies_ms.append((now - asked) * 1e3)
        peak = max(peak, rss_mb())
    turns.rates.append(images / (now - start))
    if work.meter:
        turns.add_waits(work.meter.waits.since(before))
        turns.depth += [(turns.wall_s + at - start, count) for at, count in list(work.meter.depths) if start <= at <= now]
    turns.wall_s += now - start
    turns.rss_mb = (turns.rss_mb[0] or memory, rss_mb(), max(turns.rss_mb[2], peak))
    return images


def settle() -> None:
    """Wait until this process is idle: what is being made ahead is finished. At most some seconds."""
    end = time.perf_counter() + _SETTLE_S
    quiet = 0
    while quiet < 2 and time.perf_counter() < end:  # twice: once may be another program that has the cores
        before = time.process_time()
        time.sleep(_QUIET_S)
        quiet = quiet + 1 if time.process_time() - before < _QUIET_CPU_S else 0


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
