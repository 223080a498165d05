"""Curves of a report as inline SVG: text stays text, colours are the page's (so that they follow light and dark).

matplotlib draws with the colours of LIGHT; each is then replaced by a variable of the page's style sheet. The palette is that of
Okabe and Ito, which colour-blind people can tell apart; lines differ in dashes as well.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.monitor import RECORDED, STAGES
from train.figures.kernels import need_matplotlib
from train.report.facts import Epoch, Run
from train.report.groups import Group, stat

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#1b1c1d", "#d8d9da"  # text and axes; grid lines
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c2e", "#6b6b6c")
# Each of the colours above in light and dark: the page's variables --ink, --grid, --c0 to --c7.
DARK = ("#e4e5e6", "#3c3e40", "#4da6e0", "#ff8a3d", "#2fc79b", "#e59ac6", "#f2b84b", "#8fd0f5", "#c9a66b", "#a5a6a8")
LIGHT = (INK, GRID, *PALETTE)
NAMES = ("ink", "grid", *(f"c{number}" for number in range(len(PALETTE))))
_DASHES = ("-", "--", ":", "-.")
_STYLE: Any = {  # matplotlib's type lists all its settings
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "text.color": INK, "grid.color": GRID, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "lines.linewidth": 1.6, "legend.frameon": False, "legend.fontsize": 8, "axes.linewidth": 0.7, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7}


def draw(name: str, title: str, paint: Callable[[Axes], None], columns: int = 5) -> str:
    """One chart as an `<svg>` element, its legend in so many columns above it.

    Args:
        name: unique in the page, prefix of the ids within.
        title: for those who cannot see it.
        paint: draws it.

    Raises RuntimeError without matplotlib.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(dpi=72, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
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
    from html import escape

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
    for colour, variable in zip(LIGHT, NAMES):
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"\bfont: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", svg)  # the family is the page's
    return re.sub(r"\n\s*", "\n", svg).strip()


Figure = Callable[[Epoch], "float | None"]


def mean_by_epoch(runs: Sequence[Run], figure: Figure) -> tuple[list[int], list[float]]:
    """Epochs (from 1) that all of these runs, but those without any, have done, and the mean of a figure at each."""
    known = [{epoch.epoch + 1: value for epoch in run.epochs if (value := figure(epoch)) is not None}
             for run in runs if run.epochs]
    shared = sorted(set.intersection(*(set(values) for values in known))) if known else []
    means = [stat(values[epoch] for values in known) for epoch in shared]
    return shared, [mean.mean for mean in means if mean is not None]


def errors(group: Group) -> Callable[[Axes], None]:
    """Training and validation errors by epoch: each run thin, the mean of several bold."""
    curves: tuple[tuple[str, Figure], ...] = (
        ("training top-1", lambda epoch: epoch.error), ("validation top-1", lambda epoch: epoch.top1),
        ("validation top-5", lambda epoch: epoch.top5))

    def paint(axes: Axes) -> None:
        several = len(group.runs) > 1
        for number, (label, figure) in enumerate(curves):
            colour, dashes = PALETTE[number], _DASHES[(1, 0, 3)[number]]
            for run in group.runs:
                points = [(epoch.epoch + 1, 100 * value) for epoch in run.epochs if (value := figure(epoch)) is not None]
                if several and points:
                    axes.plot(*zip(*points), color=colour, linewidth=0.6, alpha=0.6)
            places, means = mean_by_epoch(group.furthest, figure)
            if places:
                axes.plot(places, [100 * mean for mean in means], color=colour, linestyle=dashes, label=label,
                          marker="." if len(places) < 4 else "")
        axes.set(xlabel="epoch", ylabel="error, %")
        axes.set_ylim(bottom=0)
        _whole_epochs(axes)
    return paint


def losses(group: Group) -> Callable[[Axes], None]:
    """Training loss by step, for runs that have no epoch yet."""
    def paint(axes: Axes) -> None:
        for number, run in enumerate(group.runs):
            points = [(step.step, step.loss) for step in run.steps if step.loss is not None]
            if points:
                axes.plot(*zip(*points), color=PALETTE[number % len(PALETTE)], linewidth=1.0, label=f"seed {run.seed}")
        axes.set(xlabel="step", ylabel="training loss")
    return paint


def rates(group: Group) -> Callable[[Axes], None]:
    """Learning rate by epoch: from the lines of steps, where a warm-up shows, else from those of epochs."""
    def paint(axes: Axes) -> None:
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
    return paint


def _waited_for(state: str, epoch: Epoch) -> float:
    return epoch.waited_for.get(RECORDED[state], 0.0)


def waiting(group: Group) -> Callable[[Axes], None]:
    """Share of each epoch in which the network waited for the loader, by what it waited for; the mean of the runs."""
    parts: list[tuple[str, Figure]] = [
        (state, functools.partial(_waited_for, state)) for state in STAGES]
    parts.append(("other", lambda epoch: None if epoch.waited is None
                  else max(0.0, epoch.waited - sum(_waited_for(state, epoch) for state in STAGES))))

    def paint(axes: Axes) -> None:
        base: dict[int, float] = {}
        for number, (label, figure) in enumerate(parts):
            places, means = mean_by_epoch(group.furthest, figure)
            if not places or (max(means) < 0.0005 and label != "other"):
                continue
            below = [base.get(place, 0.0) for place in places]
            base |= {place: low + 100 * mean for place, low, mean in zip(places, below, means)}
            axes.stairs([base[place] for place in places], [*(place - 0.5 for place in places), places[-1] + 0.5], baseline=below,
                        fill=True, color=PALETTE[(0, 1, 2, 4, 7)[number]], label=label)
        axes.set(xlabel="epoch", ylabel="waiting, % of time")
        axes.set_ylim(0, max(1.0, 1.05 * max(base.values(), default=0)))
        _whole_epochs(axes)
    return paint


def compared(groups: Sequence[Group]) -> Callable[[Axes], None]:
    """Validation top-1 error by epoch, a line a group: the mean of its runs."""
    def paint(axes: Axes) -> None:
        for number, group in enumerate(groups):
            places, means = mean_by_epoch(group.furthest, lambda epoch: epoch.top1)
            axes.plot(places, [100 * mean for mean in means], color=PALETTE[number % len(PALETTE)], label=_label(group.name),
                      linestyle=_DASHES[number // len(PALETTE) % len(_DASHES)], marker="." if len(places) < 4 else "")
        axes.set(xlabel="epoch", ylabel="validation top-1 error, %")
        _whole_epochs(axes)
    return paint


def _label(name: str) -> str:
    """A name as matplotlib's text: no mathematics in it, and no beginning that hides it from the legend."""
    return f" {name}".encode("utf-8", "replace").decode().replace("$", r"\$")


def _whole_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
