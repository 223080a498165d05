"""Curves of a report as inline SVG: text stays text, colours are the page's (so that they follow light and dark).

matplotlib draws with the light colours; each is then replaced by a variable of the page's style sheet. The palette is that of
Okabe and Ito, which colour-blind people can tell apart; lines differ in dashes as well.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.monitor import RECORDED, STAGES
from train.figures.kernels import need_matplotlib
from train.report.groups import Group, by_images, stat
from train.report.runs import Epoch, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Variables of the page → colour in light and in dark: text and axes, grid lines, lines of curves.
COLOURS = {"ink": ("#1b1c1d", "#e4e5e6"), "grid": ("#d8d9da", "#3c3e40"), "c0": ("#0072b2", "#4da6e0"),
           "c1": ("#d55e00", "#ff8a3d"), "c2": ("#009e73", "#2fc79b"), "c3": ("#cc79a7", "#e59ac6"), "c4": ("#e69f00", "#f2b84b"),
           "c5": ("#56b4e9", "#8fd0f5"), "c6": ("#7a5c2e", "#c9a66b"), "c7": ("#6b6b6c", "#a5a6a8")}
INK, GRID, *PALETTE = (light for light, _ in COLOURS.values())
DASHES = ("-", "--", ":", "-.")
STYLE: Any = {  # matplotlib's type lists all its settings
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "text.color": INK, "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8, "axes.linewidth": 0.7, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7}
Chart = tuple[str, str]  # caption, <svg>
Figure = Callable[[Epoch], "float | None"]


def comparisons(groups: Sequence[Group]) -> list[Chart]:
    """Validation errors of all groups, for each data set that several of them have."""
    found = []
    for number, (data, members) in enumerate(by_images([one for one in groups if any(run.epochs for run in one.runs)])):
        if len(members) > 1:
            title = f"validation top-1 error on {data}, means over seeds"
            found.append((title, _draw(f"d{number}", title, lambda axes: _compare(axes, members), columns=2)))
    return found


def charts(group: Group, name: str) -> list[Chart]:
    """Errors, learning rate and data wait of a group; before its first epoch, losses. `name` is unique in the page."""
    if any(run.epochs for run in group.runs):
        thin = "; thin lines are single seeds" if len(group.runs) > 1 else ""
        wanted = {f"errors by epoch{thin}": _errors, "learning rate": _rates, "data wait, by stage of the loader": _waits}
    elif any(run.steps for run in group.runs):
        wanted = {"training loss; no epoch is finished": _losses}
    else:
        return []
    return [(caption, _draw(f"{name}-{number}", f"{caption}, {group.name}", lambda axes: paint(axes, group)))
            for number, (caption, paint) in enumerate(wanted.items())]


def _draw(name: str, title: str, paint: Callable[[Axes], None], columns: int = 5) -> str:
    """One chart as an `<svg>` element, its legend in so many columns above it.

    Args:
        name: unique in the page, prefix of the ids within.
        title: for those who cannot see it.

    Raises RuntimeError without matplotlib.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(dpi=72, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if axes.get_xlabel() == "epoch":
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        entries = len(axes.get_legend_handles_labels()[0])
        figure.set_size_inches(4.6, 2.8 + 0.18 * -(-entries // columns))
        if entries:
            figure.legend(loc="outside upper left", ncols=columns, borderpad=0.1, columnspacing=1.2, handlelength=1.8)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has it
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """A file of matplotlib's as an element of an HTML page: no prolog, no style for the whole page, ids of its own."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    start = f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{escape(title)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    for variable, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r"\bfont-family: [^;\"]*; ?", "", svg)  # the family is the page's
    return re.sub(r"\n\s*", "\n", svg).strip()


def mean_by_epoch(runs: Sequence[Run], figure: Figure) -> tuple[list[int], list[float]]:
    """Epochs (from 1) that all of these runs, but those without any, have done, and the mean of a figure at each."""
    known = [{epoch.epoch + 1: value for epoch in run.epochs if (value := figure(epoch)) is not None}
             for run in runs if run.epochs]
    shared = sorted(set.intersection(*(set(values) for values in known))) if known else []
    means = [stat(values[epoch] for values in known) for epoch in shared]
    return shared, [mean.mean for mean in means if mean is not None]


def _errors(axes: Axes, group: Group) -> None:
    """Training and validation errors by epoch: each run thin, the mean of several bold."""
    curves: tuple[tuple[str, str, Figure], ...] = (
        ("training top-1", "--", lambda epoch: epoch.error), ("validation top-1", "-", lambda epoch: epoch.top1),
        ("validation top-5", "-.", lambda epoch: epoch.top5))
    for colour, (label, dashes, figure) in zip(PALETTE, curves):
        for run in group.runs if len(group.runs) > 1 else ():
            epochs, values = mean_by_epoch([run], figure)
            axes.plot(epochs, [100 * value for value in values], color=colour, linewidth=0.6, alpha=0.6)
        _line(axes, *mean_by_epoch(group.furthest, figure), color=colour, linestyle=dashes, label=label)
    axes.set(xlabel="epoch", ylabel="error, %")
    axes.set_ylim(bottom=0)


def _line(axes: Axes, epochs: list[int], shares: list[float], **look: Any) -> None:
    """A curve in percent; with markers where a line alone would hardly be seen."""
    if epochs:
        axes.plot(epochs, [100 * share for share in shares], marker="." if len(epochs) < 4 else "", **look)


def _losses(axes: Axes, group: Group) -> None:
    """Training loss by step, for runs that have no epoch yet."""
    for number, run in enumerate(group.runs):
        points = [(step.step, step.loss) for step in run.steps if step.loss is not None]
        if points:
            axes.plot(*zip(*points), color=PALETTE[number % len(PALETTE)], linewidth=1.0, label=f"seed {run.seed}")
    axes.set(xlabel="step", ylabel="training loss")


def _rates(axes: Axes, group: Group) -> None:
    """Learning rate by epoch: from the lines of steps, where a warm-up shows, else from those of epochs."""
    for number, run in enumerate(group.runs):
        batch = run.config["train"].get("batch") or 0
        scale = batch / run.train_images[0] if run.train_images and run.train_images[0] else 0.0
        points = [(step.step * scale, step.lr) for step in run.steps if step.lr] if scale else []
        points = points or [(float(epoch.epoch), epoch.lr) for epoch in run.epochs if epoch.lr]
        if points:
            points.append((float(len(run.epochs) or points[-1][0]), points[-1][1]))
            axes.step(*zip(*sorted(points)), where="post", color=PALETTE[0], alpha=1 if number == 0 else 0.4)
    low, high = axes.dataLim.y0, axes.dataLim.y1
    axes.set(xlabel="epochs done", ylabel="learning rate", yscale="log")
    if 0 < low <= high < 100 * low:  # decades alone would leave hardly a tick
        axes.set_ylim(low / 2, high * 2)
        ticks = [tick for power in range(-9, 4) for base in (1, 2, 5)
                 if low / 2 <= (tick := base * 10.0 ** power) <= high * 2]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
    axes.set_xlim(left=0)


def _waits(axes: Axes, group: Group) -> None:
    """Share of each epoch's time spent waiting for the loader, by its stage; the mean of the runs."""
    def wait(stage: str) -> Figure:
        return lambda epoch: epoch.waited_for.get(RECORDED[stage], 0.0)

    def rest(epoch: Epoch) -> float | None:
        return None if epoch.waited is None else max(0.0, epoch.waited - sum(wait(stage)(epoch) or 0.0 for stage in STAGES))

    stages: list[tuple[str, Figure]] = [(stage, wait(stage)) for stage in STAGES]
    base: dict[int, float] = {}
    for colour, (label, figure) in zip((0, 1, 2, 4, 7), [*stages, ("other", rest)]):
        epochs, means = mean_by_epoch(group.furthest, figure)
        if not epochs or (max(means) < 0.0005 and label != "other"):
            continue
        below = [base.get(epoch, 0.0) for epoch in epochs]
        base |= {epoch: low + 100 * mean for epoch, low, mean in zip(epochs, below, means)}
        axes.stairs([base[epoch] for epoch in epochs], [*(epoch - 0.5 for epoch in epochs), epochs[-1] + 0.5], baseline=below,
                    fill=True, color=PALETTE[colour], label=label)
    axes.set(xlabel="epoch", ylabel="data wait, % of time")
    axes.set_ylim(0, max(1.0, 1.05 * max(base.values(), default=0)))


def _compare(axes: Axes, groups: Sequence[Group]) -> None:
    """Validation top-1 error by epoch, a line a group: the mean of its runs."""
    for number, group in enumerate(groups):
        # As matplotlib's text: no mathematics in it, and no beginning that hides it from the legend.
        label = f" {group.name}".encode("utf-8", "replace").decode().replace("$", r"\$")
        _line(axes, *mean_by_epoch(group.furthest, lambda epoch: epoch.top1), color=PALETTE[number % len(PALETTE)], label=label,
              linestyle=DASHES[number // len(PALETTE) % len(DASHES)])
    axes.set(xlabel="epoch", ylabel="validation top-1 error, %")
