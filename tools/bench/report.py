"""What `tools/bench/__main__.py` found: ratios against aims, a table, JSON, a plot.

The one concept: a result is turns of sides; everything else is worked out from them. Of a side its median over the turns
counts, with the smallest and largest beside it; of a ratio the ratio of the medians, with the smallest and largest ratio
within one round beside it, for the two sides of a round were timed within a minute of each other.
"""
from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench.sides import BY_NAME, DATA, SIDES, Side

if TYPE_CHECKING:
    from rich.console import Console

    from tools.bench.rounds import Turn

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
            "webdataset", "spdl")


@dataclass(frozen=True)
class Result:
    """What became of one side: its turns, or why there are none.

    Attributes:
        side: which.
        turns: one a round; empty when it did not run.
        difference: grey levels between its first batch and the exact pixels; None when it makes none, or did not run.
        reason: why it did not run ("" when it did).
    """
    side: Side
    turns: tuple[Turn, ...]
    difference: float | None = None
    reason: str = ""

    @property
    def rate(self) -> float:
        """Images per second, the median."""
        return statistics.median(turn.rate for turn in self.turns)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds an image, the median."""
        return statistics.median(turn.cpu_ms for turn in self.turns)


@dataclass(frozen=True)
class Ratio:
    """One side's speed over another's.

    Attributes:
        over: name of the side above the line.
        under: name of the one below it.
        of: what `under` stands for: "best peer", "tier archives" …
        value, least, most: ratio of the medians; smallest and largest within a round.
        by_cpu: the inverse ratio of CPU time an image, which says what `value` would be with every core busy; beside other
            work on the machine it is the steadier of the two.
        aim: what it should reach; None: nothing was aimed at.
    """
    over: str
    under: str
    of: str
    value: float
    least: float
    most: float
    by_cpu: float
    aim: float | None

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached."""
        return None if self.aim is None else self.value >= self.aim


def best_peer(results: Sequence[Result], data: str) -> Result | None:
    """The fastest of the others that ran on this kind of data."""
    peers = [result for result in results if result.side.data == data and result.side.role == "peer" and result.turns]
    return max(peers, key=lambda result: result.rate, default=None)


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """The ratios that docs/results answers for, as far as their sides ran."""
    ran = {result.side.name: result for result in results if result.turns}

    def ratio(over: str, under: Result | None, of: str, aim: float | None) -> list[Ratio]:
        if over not in ran or under is None:
            return []
        rounds = [above.rate / below.rate for above, below in zip(ran[over].turns, under.turns)]
        return [Ratio(over, under.side.name, of, ran[over].rate / under.rate, min(rounds), max(rounds),
                      under.cpu_ms / ran[over].cpu_ms, aim)]

    return (ratio("archives", best_peer(results, "original"), "best peer", 1.15)
            + ratio("archives", ran.get("decode"), "whole decode alone", 0.6)
            + ratio("packed", ran.get("archives"), "tier archives", 2.7)
            + ratio("packed", best_peer(results, "packed"), "best peer", None)
            + ratio("packed", ran.get("packed_decode"), "whole decode alone", None)
            + ratio("resident", ran.get("packed"), "tier packed", 3.0)
            + ratio("resident", best_peer(results, "decoded"), "best peer", None))


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def versions() -> dict[str, str | None]:
    """Of Python and of every package a side is made with; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of this working tree, `+` when it has changes; None outside of git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(results: Sequence[Result], about: dict[str, Any]) -> dict[str, Any]:
    """Everything, for a file. `about`: date, command, work."""
    def of(result: Result) -> dict[str, Any]:
        side = result.side
        entry = {"name": side.name, "label": side.label, "data": side.data, "role": side.role, "ran": bool(result.turns),
                 "reason": result.reason or None, "grey_levels_from_exact": result.difference,
                 "turns": [{"images": turn.images, "seconds": turn.seconds, "cpu_s": turn.cpu_s} for turn in result.turns]}
        if result.turns:
            rates = [turn.rate for turn in result.turns]
            entry |= {"images_per_s": {"median": result.rate, "min": min(rates), "max": max(rates)},
                      "cpu_ms_per_image": result.cpu_ms}
        return entry

    found = [{"over": ratio.over, "under": ratio.under, "under_is": ratio.of, "value": ratio.value, "min": ratio.least,
              "max": ratio.most, "by_cpu": ratio.by_cpu, "aim": ratio.aim, "met": ratio.met} for ratio in ratios(results)]
    return {**about, "commit": commit(), "hardware": hardware(), "versions": versions(),
            "sides": [of(result) for result in results], "ratios": found}


def write_json(found: dict[str, Any], path: Path) -> None:
    """Write it, readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(results: Sequence[Result], console: Console) -> None:
    """Two tables: sides, ratios."""
    from rich.table import Table

    table = Table(title="images per second, median (smallest–largest)")
    for name in ("reads", "side", "img/s", "", "CPU ms an image", "levels off"):
        table.add_column(name, justify="right" if name in ("img/s", "CPU ms an image", "levels off") else "left")
    for data in DATA:
        rows = [result for result in results if result.side.data == data]
        for result in sorted(rows, key=lambda result: -result.rate if result.turns else 0):
            style = {"ours": "bold", "limit": "italic"}.get(result.side.role)
            first = DATA[data] if result is min(rows, key=lambda r: -r.rate if r.turns else 0) else ""
            if not result.turns:
                table.add_row(first, result.side.label, "–", f"[dim]{result.reason[:60]}[/]", style=style)
                continue
            rates = [turn.rate for turn in result.turns]
            table.add_row(first, result.side.label, f"{result.rate:,.0f}", f"({min(rates):,.0f}–{max(rates):,.0f})",
                          f"{result.cpu_ms:.2f}", "" if result.difference is None else f"{result.difference:.2f}", style=style)
        table.add_section()
    console.print(table)
    table = Table(title="ratios (smallest–largest within a round)")
    for name in ("over", "under", "ratio", "", "by CPU time", "aim", ""):
        table.add_column(name, justify="right" if name in ("ratio", "by CPU time", "aim") else "left")
    for ratio in ratios(results):
        under = ratio.of + (f": {BY_NAME[ratio.under].label}" if "best" in ratio.of else "")
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[ratio.met]
        table.add_row(BY_NAME[ratio.over].label, under, f"{ratio.value:.2f}", f"({ratio.least:.2f}–{ratio.most:.2f})",
                      f"{ratio.by_cpu:.2f}", "" if ratio.aim is None else f"{ratio.aim:g}", verdict)
    console.print(table)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """A bar a side with whiskers from smallest to largest, a panel a kind of data, a line at the limit."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = [result for result in results if result.turns]
    kinds = [data for data in DATA if any(result.side.data == data for result in ran)]
    groups = [sorted((r for r in ran if r.side.data == data and r.side.role != "limit"), key=lambda r: r.rate) for data in kinds]
    heights = [len(group) + 0.8 for group in groups]
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(9, 0.42 * sum(heights) + 1), squeeze=False, layout="constrained",
                                   gridspec_kw={"height_ratios": heights})
    for panel, data, group in zip(axes[:, 0], kinds, groups):
        rates = [result.rate for result in group]
        lows = [result.rate - min(turn.rate for turn in result.turns) for result in group]
        highs = [max(turn.rate for turn in result.turns) - result.rate for result in group]
        colours = ["#c2571a" if result.side.role == "ours" else "#8296a8" for result in group]
        panel.barh([result.side.label for result in group], rates, xerr=[lows, highs], color=colours, capsize=3, height=0.7,
                   error_kw={"lw": 1})
        limits = [result for result in ran if result.side.data == data and result.side.role == "limit"]
        for limit in limits:
            panel.axvline(limit.rate, color="black", ls="--", lw=1, label=f"{limit.side.label}: {limit.rate:,.0f}")
            panel.legend(loc="lower right", fontsize=8, framealpha=0.9)
        right = max([*(high + rate for high, rate in zip(highs, rates)), *(limit.rate for limit in limits)])
        panel.set_xlim(0, 1.14 * right)
        for place, (rate, high) in enumerate(zip(rates, highs)):
            panel.text(rate + high + 0.008 * right, place, f"{rate:,.0f}", va="center", fontsize=8,
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.set_title(DATA[data], loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images per second")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def missing(results: Sequence[Result]) -> list[str]:
    """A line for each side that did not run."""
    return [f"{result.side.name}: {result.reason}" for result in results if not result.turns]


def names() -> str:
    """Of all sides, for messages."""
    return ", ".join(side.name for side in SIDES)
