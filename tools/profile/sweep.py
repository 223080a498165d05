"""Which machine settings make the loader fastest: one after the other is varied, and a better value kept.

A setting is only changed when that gains more than the noise, so that the answer is no lottery.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.config import LoaderConfig
from pipeline.loading.train_loader import TrainLoader
from tools.profile.measure import measure
from tools.profile.stages import end_to_end

_GAIN = 1.02    # a change must give so much
Axes = Sequence[tuple[str, Sequence[float]]]    # settings that are varied, and the values that are tried


@dataclass(frozen=True)
class Point:
    """One setting: `settings` (threads, prefetch, …, batch), images/s and CPU ms an image, medians of the rounds."""
    settings: dict[str, float]
    rate: float
    cpu_ms: float


def axes(machine: LoaderConfig, batch: int, cores: int, gpu: bool, most: int) -> Axes:
    """What is varied, with batches of at most `most` images."""
    decoder = [("hw_decoder_load", (0.0, 0.3, 0.5, 0.65, 0.8, 1.0))] if gpu else []
    return [("threads", sorted({1, max(1, cores // 2), cores, 2 * cores if gpu else cores})), ("prefetch", (1, 2, 3)),
            ("read_threads", (1, 2, 4, 8)), ("batch", sorted({max(1, batch // 2), batch, min(2 * batch, most)})), *decoder]


def sweep(make: Callable[[LoaderConfig, int], TrainLoader], machine: LoaderConfig, batch: int, along: Axes, seconds: float,
          rounds: int) -> list[Point]:
    """All points measured, the chosen one first, the others by rate.

    Args:
        make: (settings, batch) → a loader; closed here.
        machine, batch: where to begin.
        along: see `axes`.
        seconds, rounds: of each point.
    """
    def point(settings: dict[str, float]) -> Point:
        fields = {name: value if name == "hw_decoder_load" else int(value) for name, value in settings.items() if name != "batch"}
        with make(replace(machine, **fields), int(settings["batch"])) as loader:  # type: ignore[arg-type]
            figures = measure([end_to_end(loader)], seconds, rounds)["loader"]
        return Point(settings, figures.rate, figures.cpu)

    best = point({name: getattr(machine, name) if name != "batch" else batch for name, _ in along} | {"batch": batch})
    points = [best]
    for name, values in along:
        for value in values:
            settings = {**best.settings, name: value}
            if all(settings != other.settings for other in points):
                points.append(point(settings))
        top = max(points, key=lambda point: point.rate)
        if top.rate > best.rate * _GAIN:
            best = top
    return [best, *sorted((point for point in points if point is not best), key=lambda point: -point.rate)]
