"""Which settings of the machine make the loader fastest: one after the other is varied, the best value kept.

The one concept: a setting is only changed when that gains more than the noise, so that the answer is no lottery.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.config import LoaderConfig
from pipeline.loading.train_loader import TrainLoader
from tools.profile.stages import whole
from tools.profile.measure import take_turns

_GAIN = 1.02    # a change must give so much


@dataclass(frozen=True)
class Point:
    """One setting: `settings` (threads, prefetch, …, batch), images/s and CPU ms an image, medians of the repeats."""
    settings: dict[str, float]
    rate: float
    cpu_ms: float


def axes(machine: LoaderConfig, batch: int, cores: int, gpu: bool) -> list[tuple[str, Sequence[float]]]:
    """What is varied, and which values are tried."""
    threads = sorted({1, max(1, cores // 2), cores, 2 * cores if gpu else cores})
    found: list[tuple[str, Sequence[float]]] = [("threads", threads), ("prefetch", (1, 2, 3)), ("read_threads", (1, 2, 4, 8)),
                                                ("batch", sorted({max(1, batch // 2), batch, 2 * batch}))]
    return [*found, ("hw_decoder_load", (0.0, 0.3, 0.5, 0.65, 0.8, 1.0))] if gpu else found


def sweep(make: Callable[[LoaderConfig, int], TrainLoader], machine: LoaderConfig, batch: int,
          along: Sequence[tuple[str, Sequence[float]]], seconds: float, repeats: int) -> list[Point]:
    """All points measured, the chosen one first, the others by rate.

    Args:
        make: (settings, batch) → a loader; closed here.
        machine, batch: where to begin.
        along: see `axes`.
        seconds, repeats: of each point.
    """
    def measure(settings: dict[str, float]) -> Point:
        fields = {name: value if name == "hw_decoder_load" else int(value) for name, value in settings.items() if name != "batch"}
        with make(replace(machine, **fields), int(settings["batch"])) as loader:  # type: ignore[arg-type]
            turns = take_turns([whole(loader)], seconds, repeats)["loader"]
        return Point(settings, statistics.median(turns.rates), statistics.median(turns.cpu_ms))

    best = measure({name: getattr(machine, name) if name != "batch" else batch for name, _ in along} | {"batch": batch})
    points = [best]
    for name, values in along:
        for value in values:
            settings = {**best.settings, name: value}
            if any(point.settings == settings for point in points):
                continue
            points.append(measure(settings))
        top = max(points, key=lambda point: point.rate)
        if top.rate > best.rate * _GAIN:
            best = top
    return [best, *sorted((point for point in points if point is not best), key=lambda point: -point.rate)]
