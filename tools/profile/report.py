"""Shows a profile of the loader: tables on a terminal, JSON, a plot, a trace for chrome://tracing or Perfetto.

A `Profile` is all figures of one run of tools/profile_pipeline.py; every function here shows it and measures nothing. Rates are
images/s, with the smallest and largest of the rounds beside their median.
"""
from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tools.profile.measure import Figures

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.monitor import Event
    from tools.profile.sweep import Point
    from tools.profile.verdict import Measured, Setup, Verdict

_BARS = " ▁▂▃▄▅▆▇█"
_STAGE = ("name", "rates", "cpu_ms", "threads", "image_bytes", "rate", "cpu", "mb_s")   # what JSON has of a stage,
_LOADER = ("rates", "cpu_ms", "latency_ms", "waited", "causes", "depth", "rss_mb", "rate", "cpu")   # of the loader,
_TOGETHER = ("rates", "waited", "causes", "rate")   # and of the loader with its consumer


@dataclass(frozen=True)
class Profile:
    """All that was measured.

    Attributes:
        title: what was profiled.
        batch: images of a batch.
        measured, setup, verdict: see tools/profile/verdict.py.
        cumulative: the loader cut off after each stage.
        cold: the loader after the page cache was emptied, or None.
        cold_note: what is to be said about that.
        need_from: where the need comes from.
        sweep: points, best first.
        compared: this loader and others doing the same work in turns: name → images/s, one figure a round; this one first.
        absent: others that could not run, and why.
        versions: of libraries.
    """
    title: str
    batch: int
    measured: Measured
    setup: Setup
    verdict: Verdict
    cumulative: tuple[Figures, ...] = ()
    cold: Figures | None = None
    cold_note: str = ""
    need_from: str = ""
    sweep: Sequence[Point] = ()
    compared: dict[str, tuple[float, ...]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> float | None:
        """Rate together ÷ need; of the loader alone when they were not run together; None without a need."""
        measured = self.measured
        return (measured.together or measured.loader).rate / measured.need if measured.need else None


# --- JSON

def as_json(profile: Profile) -> dict[str, Any]:
    """Everything as plain values: rounds under their own names, medians beside them."""
    measured, together = profile.measured, profile.measured.together
    plain: dict[str, Any] = {
        "title": profile.title, "batch": profile.batch, "facts": asdict(profile.setup), "versions": profile.versions,
        "stages": [_stage(stage) for stage in measured.stages], "cumulative": [_stage(stage) for stage in profile.cumulative],
        "loader": _pick(measured.loader, _LOADER), "cold": profile.cold and _pick(profile.cold, _LOADER),
        "cold_note": profile.cold_note,
        "cpu_ms": {"stages": sum(stage.cpu for stage in measured.stages), "loader": measured.loader.cpu,
                   "remainder": measured.remainder_ms},
        "need": measured.need, "need_from": profile.need_from, "headroom": measured.headroom,
        "together": None, "met": profile.met, "verdict": asdict(profile.verdict),
        "sweep": [asdict(point) for point in profile.sweep],
        "compared": {name: {"rates": rates, "rate": statistics.median(rates)} for name, rates in profile.compared.items()},
        "absent": profile.absent}
    if together is not None:
        plain["together"] = _pick(together, _TOGETHER) | {"of_slower": together.rate / _slower(measured)}
    return plain


def _pick(figures: Figures, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(figures, name) for name in names}


def _stage(stage: Figures) -> dict[str, Any]:
    return _pick(stage, _STAGE) | {"core_rate": stage.core_rate if stage.cpu else None}


def _slower(measured: Measured) -> float:
    """The slower of loader and consumer, alone."""
    return min(measured.loader.rate, measured.need or measured.loader.rate)


def write_json(content: dict[str, Any], path: Path, indent: int | None = 1) -> None:
    """Write JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


# --- tables

def show(profile: Profile, stream: IO[str]) -> None:
    """Print everything for a person."""
    from rich.console import Console

    console = Console(file=stream, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    console.print(profile.title, style="bold")
    _show_stages(console, profile)
    _show_loader(console, profile)
    for line in (*_need_lines(profile), *_compared_lines(profile), *_sweep_lines(profile)):
        console.print(line, soft_wrap=line.startswith("    "))
    console.print()
    console.print("verdict: " + profile.verdict.sentence, style="bold")
    console.print("advice, to paste into the recipe" + (" (where it differs from the sweep, take the sweep's):"
                                                        if profile.sweep else ":"))
    console.print(textwrap.indent(profile.verdict.advice_yaml.rstrip(), "    "), soft_wrap=True)


def _show_stages(console: Console, profile: Profile) -> None:
    from rich.table import Table

    table = Table(title="stages, each alone", title_justify="left")
    for name in ("stage", "threads", "img/s", "min…max", "img/s of one core", "CPU ms/img", "MB/s", "img/s up to here"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    cumulative = {stage.name: f"{stage.rate:,.0f}" for stage in profile.cumulative}
    for stage in profile.measured.stages:
        table.add_row(stage.name, str(stage.threads), f"{stage.rate:,.0f}", extremes(stage.rates),
                      f"{stage.core_rate:,.0f}" if stage.cpu else "", f"{stage.cpu:.3f}",
                      f"{stage.mb_s:,.0f}" if stage.mb_s else "", cumulative.get(stage.name, ""))
    console.print(table)
    measured = profile.measured
    total = sum(stage.cpu for stage in measured.stages)
    share = measured.remainder_ms / measured.loader.cpu if measured.loader.cpu else 0.0
    console.print(f"CPU ms an image: the stages {total:.3f}, end to end {measured.loader.cpu:.3f}, remainder "
                  f"{measured.remainder_ms:+.3f} ({share:+.1%})")


def _show_loader(console: Console, profile: Profile) -> None:
    from rich.table import Table

    table = Table(title="the loader, end to end", title_justify="left")
    for name in ("page cache", "img/s", "min…max", "CPU ms/img", "ms a batch p50", "p95", "p99", "max", "stall", "while"):
        table.add_column(name, justify="right")
    loader = profile.measured.loader
    for name, figures in (("warm", loader), ("cold", profile.cold)):
        if figures is not None:
            table.add_row(name, f"{figures.rate:,.0f}", extremes(figures.rates), f"{figures.cpu:.3f}",
                          *(f"{value:.1f}" for value in figures.latency_ms), f"{figures.waited:.0%}", shares(figures.causes))
    console.print(table)
    if profile.cold_note:
        console.print(f"cold: {profile.cold_note}")
    before, after, peak = loader.rss_mb
    if peak:
        console.print(f"memory: {before:,.0f} MB before, {after:,.0f} after, {peak:,.0f} at most")
    if ready := [count for _, count in loader.depth]:
        console.print(f"batches ready when asked: {sparkline(ready)}  mean {statistics.mean(ready):.2f}, at most {max(ready)}")


def _need_lines(profile: Profile) -> Iterator[str]:
    measured, together = profile.measured, profile.measured.together
    if measured.need is None:
        yield "need: not asked for (--model measures the network's, --need N states it)"
        return
    yield f"need: {measured.need:,.0f} img/s ({profile.need_from}); headroom {measured.headroom:.2f}× (loader alone ÷ need)"
    if together is not None:
        yield (f"together: {together.rate:,.0f} img/s ({extremes(together.rates)}), {together.rate / _slower(measured):.2f} of "
               f"the slower alone, {together.rate / measured.need:.2f} of the need; stall {together.waited:.1%} of the time"
               + (f", meanwhile the loader was at: {shares(together.causes)}" if together.causes else ""))


def _compared_lines(profile: Profile) -> Iterator[str]:
    if not profile.compared:
        return
    yield "the same work in turns, each in a process of its own:"
    rates = {name: statistics.median(figures) for name, figures in profile.compared.items()}
    ours = next(iter(rates.values()))
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        yield f"  {name:45} {rate:9,.0f} img/s  ({extremes(profile.compared[name])})  {rate / ours:.2f} of this loader"
    yield from (f"  did not run: {line}" for line in profile.absent)


def _sweep_lines(profile: Profile) -> Iterator[str]:
    if not profile.sweep:
        return
    yield "sweep, best first:"
    for point in profile.sweep[:10]:
        settings = ", ".join(f"{name} {value:g}" for name, value in point.settings.items())
        yield f"  {settings:60} {point.rate:9,.0f} img/s  {point.cpu_ms:6.3f} CPU ms"
    best, worst = profile.sweep[0], min(point.rate for point in profile.sweep)
    yield "best setting:"
    yield (f"    # {best.rate:,.0f} img/s, {best.cpu_ms:.3f} CPU ms an image; the slowest of {len(profile.sweep)} settings gave "
           f"{worst:,.0f}")
    yield "    machine:"
    yield from (f"      {name}: {value:g}" for name, value in best.settings.items() if name != "batch")
    yield f"    # measured with train.batch {best.settings['batch']:g}, which is part of the recipe: it changes results"


def extremes(values: Sequence[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):,.0f}…{max(values):,.0f}"


def shares(causes: dict[str, float]) -> str:
    """States and their shares, largest first, those above 1%."""
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(causes.items(), key=lambda item: -item[1]) if share > 0.01)


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """A line of bars: the mean of each of at most `width` equal pieces."""
    top, pieces = max([1.0, *values]), min(width, len(values))
    edges = [len(values) * piece // pieces for piece in range(pieces + 1)] if pieces else []
    means = [statistics.mean(values[low:high]) for low, high in zip(edges, edges[1:])]
    return "".join(_BARS[round(mean / top * (len(_BARS) - 1))] for mean in means)


# --- plot and trace

def plot(profile: Profile, path: Path) -> None:
    """Write a PNG: the loader and its stages as bars of images/s (logarithmic), the need as a line."""
    from matplotlib.figure import Figure

    measured = profile.measured
    bars: list[tuple[str, Sequence[float], str]] = [("loader, end to end", measured.loader.rates, "#1b4965")]
    if measured.together is not None:
        bars.append(("with its consumer", measured.together.rates, "#5fa8d3"))
    if profile.cold is not None:
        bars.append(("loader, cold files", profile.cold.rates, "#62b6cb"))
    bars += [(f"{stage.name} alone", stage.rates, "#d1495b" if stage.name == profile.verdict.limit else "#b8bcc2")
             for stage in measured.stages]
    bars += [(name, rates, "#e0a458") for name, rates in profile.compared.items()]
    figure = Figure(figsize=(9, 1.7 + 0.36 * len(bars)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(bars), 0, -1)
    medians = [statistics.median(rates) for _, rates, _ in bars]
    whiskers = [[middle - min(rates) for middle, (_, rates, _) in zip(medians, bars)],
                [max(rates) - middle for middle, (_, rates, _) in zip(medians, bars)]]
    axes.barh(rows, medians, color=[colour for *_, colour in bars], height=0.7, xerr=whiskers, ecolor="#555555", capsize=2)
    axes.set_yticks(rows, [name for name, *_ in bars])
    axes.set_xscale("log")
    rates_shown = [*medians, measured.need or medians[0]]
    axes.set_xlim(min(rates_shown) / 2, max(rates_shown) * 4)
    for row, (_, rates, _), middle in zip(rows, bars, medians):
        axes.text(max(rates) * 1.08, row, f"{middle:,.0f}", va="center", fontsize=8)
    if measured.need:
        axes.axvline(measured.need, color="#2a9d4a", linewidth=2)
        axes.text(measured.need * 1.06, len(bars) + 0.72, f"need {measured.need:,.0f}", color="#2a9d4a", fontsize=9)
    axes.set_ylim(0.4, len(bars) + 1.2)
    axes.set_xlabel("images per second (logarithmic); whiskers: smallest and largest round")
    figure.suptitle(f"{profile.title}\n" + "\n".join(textwrap.wrap(profile.verdict.sentence, 125)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def trace(events: Sequence[Event], depths: Sequence[tuple[float, int]] = ()) -> dict[str, Any]:
    """Events in the Trace Event Format (chrome://tracing, ui.perfetto.dev): a track a thread, complete events (ph "X") in µs with
    the step as argument, the queue as a counter."""
    start = min([event.start_s for event in events] + [time for time, _ in depths], default=0.0)
    tracks = {name: number for number, name in enumerate(dict.fromkeys(event.thread for event in events), 1)}
    lines: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "loader"}}]
    lines += [{"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}}
              for name, number in tracks.items()]
    lines += [{"name": event.name, "cat": "loader", "ph": "X", "ts": (event.start_s - start) * 1e6,
               "dur": (event.end_s - event.start_s) * 1e6, "pid": 1, "tid": tracks[event.thread], "args": {"step": event.step}}
              for event in sorted(events, key=lambda event: event.start_s)]
    lines += [{"name": "batches ready", "ph": "C", "ts": (time - start) * 1e6, "pid": 1, "args": {"batches": count}}
              for time, count in depths]
    return {"displayTimeUnit": "ms", "traceEvents": lines}
