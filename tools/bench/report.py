"""Shows what `make bench` measured: a table, JSON, a plot.

Of a contender its median over the rounds counts, with the smallest and largest beside it; a ratio is taken within each round,
whose turns were a minute apart, and its median counts.
"""
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.bench.contenders import CONTENDERS, KINDS
from tools.bench.rounds import Result
from tools.profile.measure import Spread, ratio, spread

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
             "webdataset", "spdl")
_COLOURS = {"ours": "#c2571a", "peer": "#8296a8"}


class Ratio(NamedTuple):
    """Speed of one contender over another's, and the same by CPU time an image: what it would be with every core busy."""
    over: str
    under: str
    value: Spread
    by_cpu: float


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Each of our tiers over the fastest peer of the same data, and over the limit."""
    ran = [result for result in results if result.turns]
    made = []
    for over in ran:
        for role in ("peer", "limit") if over.contender.role == "ours" else ():
            others = [other for other in ran if (other.contender.data, other.contender.role) == (over.contender.data, role)]
            if others:
                under = max(others, key=lambda other: median(other.rates))
                made.append(Ratio(over.contender.name, under.contender.name, ratio(over.rates, under.rates),
                                  median(under.cpu_ms) / median(over.cpu_ms)))
    return made


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": [*models, platform.processor() or platform.machine()][0], "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory, 1)}


def as_json(results: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, for a file. `about`: date, command, work."""
    def of(result: Result) -> dict[str, Any]:
        contender = result.contender
        entry = {"name": contender.name, "label": contender.label, "data": contender.data, "role": contender.role,
                 "ran": bool(result.turns), "reason": result.reason or None, "grey_levels_from_exact": result.difference,
                 "turns": [{"images": turn.images, "seconds": turn.seconds, "cpu_s": turn.cpu_s} for turn in result.turns]}
        if result.turns:
            middle, least, most = spread(result.rates)
            entry |= {"images_per_s": {"median": middle, "min": least, "max": most}, "cpu_ms_per_image": median(result.cpu_ms)}
        return entry

    installed = {name: metadata.version(name) for name in _PACKAGES if any(metadata.distributions(name=name))}
    plain = [{"over": one.over, "under": one.under, "value": one.value.median, "min": one.value.least, "max": one.value.most,
              "by_cpu": one.by_cpu} for one in ratios(results)]
    return {**about, "hardware": hardware(), "versions": {"python": platform.python_version(), **installed},
            "sides": list(map(of, results)), "ratios": plain}


def show(results: Sequence[Result], console: "Console") -> None:
    """A table of the contenders, and the ratios."""
    from rich.table import Table

    table = Table(title="images per second, median (smallest–largest)")
    for name in ("reads", "contender", "img/s", "", "CPU ms an image", "levels off"):
        table.add_column(name, justify="right" if name in ("img/s", "CPU ms an image", "levels off") else "left")
    for kind, label in KINDS.items():
        rows = [result for result in results if result.contender.data == kind]
        for result in sorted(rows, key=lambda result: -median(result.rates) if result.turns else 0):
            cells = ["–", f"[dim]{result.reason[:60]}[/]"]
            if result.turns:
                middle, least, most = spread(result.rates)
                cells = [f"{middle:,.0f}", f"({least:,.0f}–{most:,.0f})", f"{median(result.cpu_ms):.2f}",
                         "" if result.difference is None else f"{result.difference:.2f}"]
            table.add_row(label, result.contender.label, *cells, style="bold" if result.contender.role == "ours" else None)
            label = ""
        table.add_section()
    console.print(table)
    for one in ratios(results):
        console.print(f"{CONTENDERS[one.over].label}: {one.value.median:.2f} ({one.value.least:.2f}–{one.value.most:.2f}) of "
                      f"{CONTENDERS[one.under].label}, by CPU time {one.by_cpu:.2f}", highlight=False)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """A bar a contender with whiskers from smallest to largest, a panel a kind of data, a line at the limit."""
    from matplotlib.figure import Figure

    ran = sorted([(spread(result.rates), result.contender) for result in results if result.turns], key=lambda pair: pair[0])
    kinds = [kind for kind in KINDS if any(contender.data == kind for _, contender in ran)]
    bars = [[pair for pair in ran if pair[1].data == kind and pair[1].role != "limit"] for kind in kinds]
    heights = [len(group) + 0.8 for group in bars]
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(kinds), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, kind, group in zip(axes, kinds, bars):
        panel.barh([contender.label for _, contender in group], [rates.median for rates, _ in group], capsize=3, height=0.7,
                   xerr=[[rates.median - rates.least for rates, _ in group], [rates.most - rates.median for rates, _ in group]],
                   color=[_COLOURS[contender.role] for _, contender in group], error_kw={"lw": 1})
        for row, (rates, _) in enumerate(group):
            panel.text(rates.most * 1.01, row, f"{rates.median:,.0f}", va="center", fontsize=8)
        for rates, contender in ran:
            if (contender.data, contender.role) == (kind, "limit"):
                panel.axvline(rates.median, color="black", ls="--", lw=1, label=f"{contender.label}: {rates.median:,.0f}")
                panel.legend(loc="lower right", fontsize=8, framealpha=0.9)
        panel.set_xlim(0, 1.14 * max(rates.most for rates, contender in ran if contender.data == kind))
        panel.set_title(KINDS[kind], loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("images per second")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
