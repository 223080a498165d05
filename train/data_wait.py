"""Data wait of a run's training, its cause and the loader's headroom, in one line at the end of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Iterator

from pipeline.config import LoaderConfig
from pipeline.monitor import REMEDIES, STAGES, Monitor, Usage, Waits, headroom, remedies, usage

SMALL = 0.01  # a data wait below this share of the time needs no advice


@dataclass
class DataWait:
    """What the loop waited for its loader, and how busy the loader's threads were, during training without validation."""

    waits: Waits = field(default_factory=Waits)
    used: Usage = field(default_factory=Usage)
    _start: tuple[Waits, Usage] = (Waits(), Usage())
    _has_batch: bool = False

    @contextlib.contextmanager
    def measured(self, monitor: Monitor) -> Iterator[None]:
        """Count what happens inside."""
        self._start = monitor.waits, usage(monitor)
        try:
            yield
        finally:
            waits, used = self._start
            self.waits = self.waits.plus(monitor.waits.since(waits))
            self.used = self.used.plus(usage(monitor).since(used))

    def batch_arrived(self, monitor: Monitor) -> None:
        """The first batch of a run is not counted: until then the loader has been starting."""
        if not self._has_batch:
            self._has_batch, self._start = True, (monitor.waits, usage(monitor))

    def summary(self, machine: LoaderConfig, threads: int, on_gpu: bool, tier: str = "archives", swaps: bool = False) -> str:
        """The line, with headroom or advice; empty when nothing was trained.

        Args:
            machine, threads, tier: the loader's settings, number of decoding threads and tier.
            on_gpu: decoding runs on a GPU, whose headroom the CPU's threads do not show.
            swaps: half of each batch comes from another process, and waiting for it counts as copying.
        """
        if self.used.time <= 0 or not self.waits.batches:
            return ""
        share = min(1.0, self.waits.seconds / self.used.time)
        if share < SMALL:
            room = headroom(self.used, machine, threads)
            return f"data wait: {share:.1%} of the time" + (
                "" if on_gpu else f"; the loader has {room.times:.1f}× headroom ({room.stage} is its busiest part)")
        cause = self.waits.cause
        advice = ("try --parallel.feed=replicate" if swaps and cause == "copy" else
                  "; or ".join(REMEDIES[remedy] for remedy in remedies(tier, cause)))
        shares = {stage: getattr(self.waits, stage) / self.waits.seconds for stage in STAGES}
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        parts = ", ".join(f"{stage} {part:.0%}" for stage, part in shares.items() if part >= 0.005)
        return (f"data wait: {share:.1%} of the time (of that {parts}): {advice}; `python tools/profile_pipeline.py --config "
                "RECIPE` measures what would help")
