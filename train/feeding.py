"""Whether the loader fed the network: one sentence at the end of a run.

Waiting is the loop's, measured by the loader's meter (on the device's clock where there is one); head-room comes from how busy
the loader's threads were (`pipeline.headroom`).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Iterator

from pipeline.config import LoaderConfig
from pipeline.headroom import Usage, headroom, usage
from pipeline.loader import TrainLoader
from pipeline.meter import STATES, Waits

FED = 0.01  # a share of waiting below which the network is fed

ADVICE = {
    "read": "put the archives on faster storage or raise machine.read_threads; or write packed shards once "
            "(tools/pack_shards.py, data.tier: packed), or keep the images in memory (data.tier: resident)",
    "decode": "write packed shards once (tools/pack_shards.py, data.tier: packed), or keep the images in memory (data.tier: "
              "resident), or give the loader more threads (machine.threads)",
    "colour": "give the loader more threads (machine.threads)",
    "copy": "raise machine.queue",
}

STREAMED = ("raise data.lanes (another order, so another run), or copy the shards to a disk of this machine (data.tier: packed), "
            "or keep the images in memory (data.tier: resident)")


@dataclass
class Feeding:
    """Waiting and work of the loader during training, validation left out."""

    waits: Waits = field(default_factory=Waits)
    used: Usage = field(default_factory=Usage)

    @contextlib.contextmanager
    def watch(self, loader: TrainLoader) -> Iterator[None]:
        """Count what happens inside."""
        waits, before = loader.meter.waits, usage(loader.meter)
        try:
            yield
        finally:
            self.waits = self.waits.plus(loader.meter.waits.since(waits))
            self.used = self.used.plus(usage(loader.meter), before)

    def sentence(self, machine: LoaderConfig, threads: int, on_gpu: bool, tier: str = "archives") -> str:
        """Who waited for whom, with head-room or advice; empty when nothing was trained.

        Args:
            machine: settings of the loader.
            threads: its decoding threads.
            on_gpu: decoding runs on a GPU, whose head-room the CPU's threads do not show.
            tier: where the images come from.
        """
        if self.used.time <= 0 or not self.waits.batches:
            return ""
        share = min(1.0, self.waits.seconds / self.used.time)
        if share < FED:
            room = headroom(self.used, machine, threads)
            more = "" if on_gpu else f", {room.times:.1f}× head-room ({room.stage} is its busiest part)"
            return f"the loader waited for the network{more}; the network waited {share:.1%} of the time"
        cause = self.waits.cause
        advice = STREAMED if tier == "streamed" and cause == "read" else ADVICE[cause]
        parts = ", ".join(f"{state} {getattr(self.waits, state) / self.waits.seconds:.0%}" for state in STATES
                          if getattr(self.waits, state) >= 0.005 * self.waits.seconds)
        return (f"the network waited for the loader {share:.1%} of the time ({parts}): {advice}; `python "
                "tools/profile_pipeline.py --config RECIPE` measures what would help")
