"""Curves of a report as SVG. The palette is that of Okabe and Ito, which colour-blind people can tell apart; so do dashes."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.monitor import METRIC_NAMES, STAGES
from train.report.groups import Group, by_images, stat
from train.report.runs import Epoch, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c2e", "#6b6b6c")
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {  # matplotlib's type lists all its settings
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#d8d9da", "grid.linewidth": 0.6, "axes.grid": True,
    "axes.axisbelow": True, "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8, "axes.linewidth": 0.7,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7}
Chart = tuple[str, bytes]  # caption, SVG
Figure = Callable[[Epoch], "float | None"]


def comparisons(groups: Sequence[Group], figure_1: Sequence[Group]) -> list[Chart]:
    """Validation errors of all groups, for each data set that several of them have; training errors of the two of figure 1."""
    trained = by_images([one for one in groups if any(run.epochs for run in one.runs)])
    wanted = [(f"validation top-1 error on {data}, means over seeds", members, lambda epoch: epoch.top1)
              for data, members in trained if len(members) > 1]
    if figure_1:
        wanted.append(("training error, ReLU against tanh (figure 1)", list(figure_1), lambda epoch: epoch.error))
    return [(title, _draw(lambda axes: _compare(axes, members, figure), columns=2)) for title, members, figure in wanted]


def charts(group: Group) -> list[Chart]:
    """Errors, learning rate and data wait of a group; none before its first epoch."""
    if not any(run.epochs for run in group.runs):
        return []
    thin = "; thin lines are single seeds" if len(group.runs) > 1 else ""
    return [(caption, _draw(lambda axes: paint(axes, group))) for caption, paint in (
        (f"errors by epoch{thin}", _errors), ("learning rate", _rates), ("data wait, by stage of the loader", _waits))]


def _draw(paint: Callable[["Axes"], None], columns: int = 5) -> bytes:
    """One chart as SVG, its legend in so many columns above it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(dpi=72, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        paint(axes)
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        entries = len(axes.get_legend_handles_labels()[0])
        figure.set_size_inches(4.6, 2.8 + 0.18 * -(-entries // columns))
        if entries:
            figure.legend(loc="outside upper left", ncols=columns, borderpad=0.1, columnspacing=1.2, handlelength=1.8)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def mean_by_epoch(runs: Sequence[Run], figure: Figure) -> tuple[list[int], list[float]]:
    """Epochs (from 1) that all of these runs, but those without any, have done, and the mean of a figure at each."""
    known = [{epoch.epoch + 1: value for epoch in run.epochs if (value := figure(epoch)) is not None}
             for run in runs if run.epochs]
    shared = sorted(set.intersection(*(set(values) for values in known))) if known else []
    means = [stat(values[epoch] for values in known) for epoch in shared]
    return shared, [mean.mean for mean in means if mean is not None]


def _line(axes: "Axes", runs: Sequence[Run], figure: Figure, **look: Any) -> None:
    """The mean of runs by epoch, in percent; with markers where a line alone would hardly be seen."""
    epochs, shares = mean_by_epoch(runs, figure)
    if epochs:
        axes.plot(epochs, [100 * share for share in shares], marker="." if len(epochs) < 4 else "", **look)


def _errors(axes: "Axes", group: Group) -> None:
    """Training and validation errors by epoch: each run thin, the mean of several bold."""
    curves: tuple[tuple[str, str, Figure], ...] = (
        ("training top-1", "--", lambda epoch: epoch.error), ("validation top-1", "-", lambda epoch: epoch.top1),
        ("validation top-5", "-.", lambda epoch: epoch.top5))
    for colour, (label, dashes, figure) in zip(PALETTE, curves):
        for run in group.runs if len(group.runs) > 1 else ():
            _line(axes, [run], figure, color=colour, linewidth=0.6, alpha=0.6)
        _line(axes, group.furthest, figure, color=colour, linestyle=dashes, label=label)
    axes.set_ylabel("error, %")
    axes.set_ylim(bottom=0)


def _rates(axes: "Axes", group: Group) -> None:
    for run in group.runs:
        points = [(epoch.epoch + 1, epoch.lr) for epoch in run.epochs if epoch.lr]
        if points:
            axes.step(*zip(*points), where="mid", color=PALETTE[0], alpha=1 if run is group.runs[0] else 0.4,
                      marker="." if len(points) < 4 else "")
    axes.set(ylabel="learning rate", yscale="log")


def _waits(axes: "Axes", group: Group) -> None:
    """Share of each epoch's time spent waiting for the loader, by its stage; the mean of the runs."""
    def wait(stage: str) -> Figure:
        return lambda epoch: epoch.waited_for.get(METRIC_NAMES[stage], 0.0)

    def rest(epoch: Epoch) -> float | None:
        return None if epoch.waited is None else max(0.0, epoch.waited - sum(wait(stage)(epoch) or 0.0 for stage in STAGES))

    base: dict[int, float] = {}
    for colour, (label, figure) in zip((0, 1, 2, 4, 7), [*((stage, wait(stage)) for stage in STAGES), ("other", rest)]):
        epochs, means = mean_by_epoch(group.furthest, figure)
        if not epochs or (max(means) < 0.0005 and label != "other"):
            continue
        below = [base.get(epoch, 0.0) for epoch in epochs]
        base |= {epoch: low + 100 * mean for epoch, low, mean in zip(epochs, below, means)}
        axes.stairs([base[epoch] for epoch in epochs], [*(epoch - 0.5 for epoch in epochs), epochs[-1] + 0.5], baseline=below,
                    fill=True, color=PALETTE[colour], label=label)
    axes.set_ylabel("data wait, % of time")
    axes.set_ylim(0, max(1.0, 1.05 * max(base.values(), default=0)))


def _compare(axes: "Axes", groups: Sequence[Group], figure: Figure) -> None:
    """An error by epoch, a line a group: the mean of its runs."""
    for number, group in enumerate(groups):
        # As matplotlib's text: no mathematics in it, and no beginning that hides it from the legend.
        label = f" {group.name}".encode("utf-8", "replace").decode().replace("$", r"\$")
        _line(axes, group.furthest, figure, color=PALETTE[number % len(PALETTE)], label=label,
              linestyle=DASHES[number // len(PALETTE) % len(DASHES)])
    axes.set_ylabel("top-1 error, %")
