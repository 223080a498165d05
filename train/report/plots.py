"""Curves of a report by epoch: what the page draws as SVG of its own, in colours that colour-blind people can tell apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.monitor import METRIC_NAMES, STAGES
from train.report.groups import Group, stat
from train.report.runs import Epoch, Run

COLOURS = 8  # of the page's style
LEFT, TOP, WIDTH, HEIGHT = 42, 10, 348, 178  # of the axes, within 400 × 220
Figure = Callable[[Epoch], "float | None"]


@dataclass(frozen=True)
class Series:
    """A curve. `points`: (epoch from 1, value)."""

    label: str
    points: tuple[tuple[int, float], ...]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves by epoch, and where they lie in the picture."""

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    log: bool = False
    legend: tuple[Series, ...] = ()  # where it is not every series

    @property
    def epochs(self) -> list[int]:
        """Those of any series."""
        return sorted({epoch for one in self.series for epoch, _ in one.points})

    def x(self, epoch: float) -> float:
        first, last = self.epochs[0], self.epochs[-1]
        return LEFT + WIDTH * ((epoch - first) / (last - first) if last > first else 0.5)

    @property
    def _range(self) -> tuple[float, float, float]:
        """Lowest and highest value of the axis (logarithms for one of `log`), and the distance of its ticks."""
        values = [value for one in self.series for _, value in one.points]
        if self.log:
            low = math.floor(math.log10(min(values)))
            return low, max(low + 1, math.ceil(math.log10(max(values)))), 1
        step = nice(max(*values, 1e-9), 5)
        return 0, step * math.ceil(max(values) / step - 1e-9) or step, step

    def y(self, value: float) -> float:
        low, high, _ = self._range
        return TOP + HEIGHT * (1 - ((math.log10(value) if self.log else value) - low) / (high - low))

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        first, last = self.epochs[0], self.epochs[-1]
        step = max(1, round(nice(max(1, last - first), 6)))
        return [(self.x(epoch), str(epoch)) for epoch in range(-(-first // step) * step, last + 1, step)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        low, high, step = self._range
        values = [low + number * step for number in range(round((high - low) / step) + 1)]
        texts = [f"{10 ** value if self.log else value:g}" for value in values]
        return [(TOP + HEIGHT * (1 - (value - low) / (high - low)), text) for value, text in zip(values, texts)]

    def line(self, one: Series) -> str:
        """The points of a curve, as SVG's polyline takes them."""
        return " ".join(f"{self.x(epoch):.1f},{self.y(value):.1f}" for epoch, value in one.points)

    @property
    def bands(self) -> list[tuple[float, float, float, str]]:
        """For each epoch a strip of the picture (left, its epoch's place, width) and what a pointer over it shows."""
        epochs, found = self.epochs, []
        for before, epoch, after in zip([epochs[0], *epochs], epochs, [*epochs[1:], epochs[-1]]):
            left, right = ((self.x(epoch) + self.x(other)) / 2 for other in (before, after))
            values = [f"{one.label}: {value:.4g}{self.unit}" for one in self.series for at, value in one.points
                      if at == epoch]
            if left == right:
                left, right = LEFT, LEFT + WIDTH
            found.append((left, self.x(epoch), right - left, "\n".join([f"epoch {epoch}", *values])))
        return found


def nice(span: float, most: int) -> float:
    """The smallest of 1, 2 and 5 times a power of ten of which at most so many fit into a span."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(step * power for step in (1, 2, 5, 10) if step * power * most >= span * (1 - 1e-9))


def mean_by_epoch(runs: Sequence[Run], figure: Figure) -> list[tuple[int, float]]:
    """(epoch from 1, mean of a figure) of the epochs that all of these runs, but those without any, have done."""
    known = [{epoch.epoch + 1: value for epoch in run.epochs if (value := figure(epoch)) is not None}
             for run in runs if run.epochs]
    shared = sorted(set.intersection(*(set(values) for values in known))) if known else []
    means = [(epoch, stat(values[epoch] for values in known)) for epoch in shared]
    return [(epoch, mean.mean) for epoch, mean in means if mean is not None]


def series(label: str, runs: Sequence[Run], figure: Figure, colour: int = 0, *, dashed: bool = False, scale: float = 1) -> Series:
    return Series(label, tuple((epoch, scale * value) for epoch, value in mean_by_epoch(runs, figure)), colour % COLOURS, dashed)


def chart(title: str, curves: Sequence[Series], unit: str = "", log: bool = False, legend: Sequence[Series] = ()) -> list[Chart]:
    """The chart of the curves that have points; none without any."""
    drawn = tuple(one for one in curves if one.points)
    return [Chart(title, drawn, unit, log, tuple(legend or drawn))] if drawn else []


def comparison(members: Sequence[Group]) -> list[Chart]:
    """Loss and top-1 error of groups on the same images, in training (dashed) and validation: the means of their seeds."""
    found = []
    for title, unit, scale, training, validation in (
            ("loss", "", 1.0, lambda epoch: epoch.loss, lambda epoch: epoch.validation_loss),
            ("err@1, %", "%", 100.0, lambda epoch: epoch.error, lambda epoch: epoch.top1)):
        curves: list[Series] = []
        for number, group in enumerate(members):
            name = f"{group.name}, " if len(members) > 1 else ""
            curves += [series(f"{name}train", group.furthest, training, number, dashed=True, scale=scale),
                       series(f"{name}validation", group.furthest, validation, number + (not name), scale=scale)]
        legend = [Series(group.name, (), number % COLOURS) for number, group in enumerate(members)
                  if len(members) > 1 and any(one.points for one in curves[2 * number:2 * number + 2])]
        found += chart(title, curves, unit, legend=legend)
    return found


def details(group: Group) -> list[Chart]:
    """What stands behind the curves of one group: its seeds, top-5 error, learning rate, data wait by stage of the loader."""
    seeds = group.counted if len(group.counted) > 1 else []
    waits = [series("in all", group.furthest, lambda epoch: epoch.waited, COLOURS - 1, scale=100)]
    for number, stage in enumerate(STAGES):
        waits.append(series(stage, group.furthest, lambda epoch: epoch.waited_for.get(METRIC_NAMES[stage]), number, scale=100))
    return [
        *chart("validation err@1 by seed, %", [series(f"seed {run.seed}", [run], lambda epoch: epoch.top1, number, scale=100)
                                               for number, run in enumerate(seeds)], "%"),
        *(chart("validation err@5, %", [series("validation", group.furthest, lambda epoch: epoch.top5, scale=100)], "%")
          if group.shows_top5 else []),
        *chart("learning rate", [series("learning rate", group.furthest, lambda epoch: epoch.lr or None)], log=True),
        *chart("data wait, % of time", waits, "%")]


def figure_1(relu_and_tanh: Sequence[Group]) -> list[Chart]:
    """Training errors of the two networks of the paper's figure 1."""
    return chart("training error, ReLU against tanh (figure 1), %", [
        series(group.name, group.furthest, lambda epoch: epoch.error, number, scale=100)
        for number, group in enumerate(relu_and_tanh)], "%")
