"""Whether the loader fed the network: one sentence at the end of a run.

Waiting is the loop's, measured by the loader's monitor (on the device's clock where there is one); head-room comes from how busy
the loader's threads were (`pipeline.monitor.headroom`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Iterator

from pipeline.config import LoaderConfig
from pipeline.monitor import REMEDIES, STAGES, Monitor, Usage, Waits, headroom, remedies, usage

FED = 0.01  # a share of waiting below which the network is fed


@dataclass
class Feeding:
    """Waiting and work of the loader during training, validation left out."""

    waits: Waits = field(default_factory=Waits)
    used: Usage = field(default_factory=Usage)
    _begun: tuple[Waits, Usage] = (Waits(), Usage())
    _started: bool = False

    @contextlib.contextmanager
    def watch(self, monitor: Monitor) -> Iterator[None]:
        """Count what happens inside."""
        self._begun = monitor.waits, usage(monitor)
        try:
            yield
        finally:
            waits, before = self._begun
            self.waits = self.waits.plus(monitor.waits.since(waits))
            self.used = self.used.plus(usage(monitor), before)

    def arrived(self, monitor: Monitor) -> None:
        """A batch has come. The first of a run is not counted: until then the loader has been starting."""
        if not self._started:
            self._started, self._begun = True, (monitor.waits, usage(monitor))

    def sentence(self, machine: LoaderConfig, threads: int, on_gpu: bool, tier: str = "archives",
                 swaps: bool = False) -> str:
        """Who waited for whom, with head-room or advice; empty when nothing was trained.

        Args:
            machine: settings of the loader.
            threads: its decoding threads.
            on_gpu: decoding runs on a GPU, whose head-room the CPU's threads do not show.
            tier: where the images come from.
            swaps: half of each batch comes from another process, and waiting for it counts as copying.
        """
        if self.used.time <= 0 or not self.waits.batches:
            return ""
        share = min(1.0, self.waits.seconds / self.used.time)
        if share < FED:
            room = headroom(self.used, machine, threads)
            more = "" if on_gpu else f", {room.times:.1f}× head-room ({room.stage} is its busiest part)"
            return f"the loader waited for the network{more}; the network waited {share:.1%} of the time"
        cause = self.waits.cause
        advice = "; or ".join(REMEDIES[remedy] for remedy in remedies(tier, cause))
        if swaps and cause == "copy":
            advice = "try --parallel.feed=replicate"
        shares = {stage: getattr(self.waits, stage) / self.waits.seconds for stage in STAGES}
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        parts = ", ".join(f"{state} {part:.0%}" for state, part in shares.items() if part >= 0.005)
        return (f"the network waited for the loader {share:.1%} of the time (of that {parts}): {advice}; `python "
                "tools/profile_pipeline.py --config RECIPE` measures what would help")
