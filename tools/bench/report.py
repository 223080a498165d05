"""Shows what `make bench` measured: ratios against aims, tables, JSON, a plot.

Of a contender its median over the rounds counts, with the smallest and largest beside it; a ratio is taken within each round,
whose turns were a minute apart, and its median counts.
"""
from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.contenders import CONTENDERS, KINDS
from tools.bench.rounds import Result
from tools.profile.measure import Spread, ratio, spread

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numpy", "pillow", "simplejpeg", "opencv-python-headless",
             "webdataset", "spdl")
# (contender, what it is compared with, in words, what the ratio should reach); "best peer": the fastest of the same data.
_RATIOS = (("archives", "best peer", "best peer", 1.15), ("archives", "decode", "whole decode alone", 0.6),
           ("packed", "archives", "tier archives", 2.7), ("packed", "best peer", "best peer", None),
           ("packed", "packed_decode", "whole decode alone", None), ("resident", "packed", "tier packed", 3.0),
           ("resident", "best peer", "best peer", None))


@dataclass(frozen=True)
class Ratio:
    """One contender's speed over another's.

    Attributes:
        over, under: names of the two.
        of: what `under` stands for: "best peer", "tier archives" …
        value: of the rounds.
        by_cpu: the inverse ratio of CPU time an image, which says what `value` would be with every core busy; beside other
            work on the machine it is the steadier of the two.
        aim: what it should reach; None: nothing was aimed at.
    """
    over: str
    under: str
    of: str
    value: Spread
    by_cpu: float
    aim: float | None

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached."""
        return None if self.aim is None else self.value.median >= self.aim


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """The ratios that docs/results answers for, as far as their contenders ran."""
    ran = {result.contender.name: result for result in results if result.turns}
    made = []
    for name, other, of, aim in _RATIOS:
        over = ran.get(name)
        if over is not None:
            peers = [result for result in ran.values()
                     if result.contender.data == over.contender.data and result.contender.role == "peer"]
            under = max(peers, key=lambda peer: median(peer.rates), default=None) if other == "best peer" else ran.get(other)
            if under is not None:
                made.append(Ratio(name, under.contender.name, of, ratio(over.rates, under.rates),
                                  median(under.cpu_ms) / median(over.cpu_ms), aim))
    return made


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GiB."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": [*models, platform.processor() or platform.machine()][0], "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory, 1)}


def versions() -> dict[str, str | None]:
    """Of Python and of every package a contender is made with; None where it is not installed."""
    installed = {name: metadata.version(name) for name in _PACKAGES if any(metadata.distributions(name=name))}
    return {"python": platform.python_version(), **{name: installed.get(name) for name in _PACKAGES}}


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
        contender = result.contender
        entry = {"name": contender.name, "label": contender.label, "data": contender.data, "role": contender.role,
                 "ran": bool(result.turns), "reason": result.reason or None, "grey_levels_from_exact": result.difference,
                 "turns": [{"images": turn.images, "seconds": turn.seconds, "cpu_s": turn.cpu_s} for turn in result.turns]}
        if result.turns:
            middle, least, most = spread(result.rates)
            entry |= {"images_per_s": {"median": middle, "min": least, "max": most}, "cpu_ms_per_image": median(result.cpu_ms)}
        return entry

    plain = [{"over": one.over, "under": one.under, "under_is": one.of, "value": one.value.median, "min": one.value.least,
              "max": one.value.most, "by_cpu": one.by_cpu, "aim": one.aim, "met": one.met} for one in ratios(results)]
    return {**about, "commit": commit(), "hardware": hardware(), "versions": versions(),
            "sides": [of(result) for result in results], "ratios": plain}


def show(results: Sequence[Result], console: Console) -> None:
    """Two tables: contenders, ratios."""
    from rich.table import Table

    table = Table(title="images per second, median (smallest–largest)")
    for name in ("reads", "contender", "img/s", "", "CPU ms an image", "levels off"):
        table.add_column(name, justify="right" if name in ("img/s", "CPU ms an image", "levels off") else "left")
    for kind, label in KINDS.items():
        rows = [result for result in results if result.contender.data == kind]
        for result in sorted(rows, key=lambda result: -median(result.rates) if result.turns else 0):
            style = {"ours": "bold", "limit": "italic"}.get(result.contender.role)
            if result.turns:
                middle, least, most = spread(result.rates)
                table.add_row(label, result.contender.label, f"{middle:,.0f}", f"({least:,.0f}–{most:,.0f})",
                              f"{median(result.cpu_ms):.2f}", "" if result.difference is None else f"{result.difference:.2f}",
                              style=style)
            else:
                table.add_row(label, result.contender.label, "–", f"[dim]{result.reason[:60]}[/]", style=style)
            label = ""
        table.add_section()
    console.print(table)
    table = Table(title="ratios (smallest–largest within a round)")
    for name in ("over", "under", "ratio", "", "by CPU time", "aim", ""):
        table.add_column(name, justify="right" if name in ("ratio", "by CPU time", "aim") else "left")
    for one in ratios(results):
        under = one.of + (f": {CONTENDERS[one.under].label}" if one.of == "best peer" else "")
        verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[one.met]
        table.add_row(CONTENDERS[one.over].label, under, f"{one.value.median:.2f}",
                      f"({one.value.least:.2f}–{one.value.most:.2f})", f"{one.by_cpu:.2f}",
                      "" if one.aim is None else f"{one.aim:g}", verdict)
    console.print(table)


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """A bar a contender with whiskers from smallest to largest, a panel a kind of data, a line at the limit."""
    from matplotlib.figure import Figure

    ran = [(result, spread(result.rates)) for result in results if result.turns]
    groups = {kind: sorted(((result, rates) for result, rates in ran if result.contender.data == kind), key=lambda pair: pair[1])
              for kind in KINDS if any(result.contender.data == kind for result, _ in ran)}
    bars = {kind: [pair for pair in group if pair[0].contender.role != "limit"] for kind, group in groups.items()}
    heights = [len(group) + 0.8 for group in bars.values()]
    figure = Figure(figsize=(9, 0.42 * sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for panel, (kind, group) in zip(axes[:, 0], bars.items()):
        rates = [rates for _, rates in group]
        panel.barh([result.contender.label for result, _ in group], [rate.median for rate in rates], capsize=3, height=0.7,
                   xerr=[[rate.median - rate.least for rate in rates], [rate.most - rate.median for rate in rates]],
                   color=["#c2571a" if result.contender.role == "ours" else "#8296a8" for result, _ in group],
                   error_kw={"lw": 1})
        for result, (limit, *_) in groups[kind]:
            if result.contender.role == "limit":
                panel.axvline(limit, color="black", ls="--", lw=1, label=f"{result.contender.label}: {limit:,.0f}")
                panel.legend(loc="lower right", fontsize=8, framealpha=0.9)
        right = max(rates.most for _, rates in groups[kind])
        panel.set_xlim(0, 1.14 * right)
        for row, rate in enumerate(rates):
            panel.text(rate.most + 0.008 * right, row, f"{rate.median:,.0f}", va="center", fontsize=8,
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.set_title(KINDS[kind], loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images per second")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
