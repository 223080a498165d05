"""What was measured of a loader, where and on what: the figures a verdict is made of, as plain values.

Rates are images per second, times CPU milliseconds per image of all threads together; every figure keeps its repeats.
"""
from __future__ import annotations

import statistics
from dataclasses import dataclass

from pipeline.config import LoaderConfig

STAGES = ("order", "read", "crc", "decode", "resize", "colour", "copy", "hand-over")    # in the order of a batch's way


@dataclass(frozen=True)
class Stage:
    """One stage, measured alone or together with all before it.

    Attributes:
        name: one of STAGES.
        rates: images/s with `threads` threads, one figure a repeat.
        cpu_ms: CPU ms an image, one figure a repeat.
        threads: that did it.
        image_bytes: mean bytes an image that go through it, where bytes are what it is about; otherwise 0.
    """
    name: str
    rates: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    threads: int
    image_bytes: float = 0.0

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
        """MB/s through it, 0 where bytes are not what it is about."""
        return self.rate * self.image_bytes / 1e6


@dataclass(frozen=True)
class EndToEnd:
    """The loader whole, asked for batches as fast as it gives them.

    Attributes:
        rates, cpu_ms: images/s and CPU ms an image, one figure a repeat.
        latency_ms: p50, p95, p99 and largest time from asking for a batch to having it.
        waited: share of the time spent waiting for the producing side.
        causes: what the producing side was doing meanwhile: state → share of the waiting; empty without waiting.
        depth: (seconds, batches ready) over time.
        rss_mb: resident memory before, after, and at most, MB.
    """
    rates: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    latency_ms: tuple[float, float, float, float]
    waited: float
    causes: dict[str, float]
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


@dataclass(frozen=True)
class Together:
    """The loader feeding the network (or a consumer of its rate).

    Attributes:
        rates: images/s, one figure a repeat.
        waited: share of the time in which the consumer waited for a batch.
        causes: as in `EndToEnd`.
    """
    rates: tuple[float, ...]
    waited: float
    causes: dict[str, float]

    @property
    def rate(self) -> float:
        """Median images/s."""
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measured:
    """All figures of one profile. `need`: images/s the network takes, or None when nobody asked; `network_here`: it is one that
    was measured on the same machine."""
    stages: tuple[Stage, ...]
    loader: EndToEnd
    need: float | None = None
    together: Together | None = None
    network_here: bool = False

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, or None where this tier has none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def headroom(self) -> float | None:
        """Loader alone ÷ need."""
        return self.loader.rate / self.need if self.need else None

    @property
    def remainder_ms(self) -> float:
        """CPU ms an image of the whole loader that no stage measured alone accounts for; negative when they take more."""
        return self.loader.cpu - sum(stage.cpu for stage in self.stages)


@dataclass(frozen=True)
class Facts:
    """Where and on what it was measured.

    Attributes:
        tier: archives, packed, streamed or resident.
        settings: of the loader, its threads decided.
        cores: this process may use.
        gpu: whether batches are made on one.
        images, square_px, image_bytes: of the split: how many, side of the square, mean bytes of a file.
        square: whether training crops come from the square only, which is what a resident set holds.
        ram_bytes: memory this process may use in all. gpu_bytes: free on its GPU.
        spinning: the archives lie on a disk that turns.
        others: share of all cores of the machine that other programs used meanwhile.
    """
    tier: str
    settings: LoaderConfig
    cores: int
    gpu: bool
    images: int
    square_px: int
    image_bytes: float
    square: bool
    ram_bytes: int
    gpu_bytes: int = 0
    spinning: bool = False
    others: float = 0.0
