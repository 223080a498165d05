"""What a profile of the loader looks like: tables on a terminal, JSON, a plot, a trace for chrome://tracing or Perfetto.

The one concept: a `Profile` is all figures of one run of tools/profile_pipeline.py; every function here shows it and measures
nothing. Rates are images per second, with the smallest and largest of the repeats beside their median.
"""
from __future__ import annotations

import dataclasses
import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from tools.profile.figures import EndToEnd, Facts, Measured, Stage
    from pipeline.monitor import Event
    from tools.profile.verdict import Verdict

_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Profile:
    """All that was measured.

    Attributes:
        title: what was profiled.
        batch: images of a batch.
        measured, facts, verdict: see tools/profile/figures.py and tools/profile/verdict.py.
        cumulative: the loader cut off after each stage.
        cold: the loader after the page cache was emptied, or None.
        cold_note: what is to be said about that.
        need_from: where the need comes from.
        sweep: (settings, images/s, CPU ms an image), best first.
        compared: this loader and others doing the same work in turns: name → images/s, one figure a turn; this one first.
        absent: others that could not run, and why.
        versions: of libraries.
    """
    title: str
    batch: int
    measured: Measured
    facts: Facts
    verdict: Verdict
    cumulative: tuple[Stage, ...] = ()
    cold: EndToEnd | None = None
    cold_note: str = ""
    need_from: str = ""
    sweep: tuple[tuple[dict[str, float], float, float], ...] = ()
    compared: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def met(self) -> float | None:
        """Rate together ÷ need; of the loader alone when they were not run together; None without a need."""
        measured = self.measured
        if not measured.need:
            return None
        return (measured.together or measured.loader).rate / measured.need


def figures(profile: Profile) -> dict[str, Any]:
    """Everything as plain values, for JSON: repeats under their own names, medians beside them."""
    measured = profile.measured
    plain: dict[str, Any] = {"title": profile.title, "batch": profile.batch, "facts": dataclasses.asdict(profile.facts),
                             "versions": profile.versions}
    plain["stages"] = [_stage(stage) for stage in measured.stages]
    plain["cumulative"] = [_stage(stage) for stage in profile.cumulative]
    plain["loader"] = _whole(measured.loader)
    plain["cold"] = None if profile.cold is None else _whole(profile.cold)
    plain["cold_note"] = profile.cold_note
    plain["cpu_ms"] = {"stages": sum(stage.cpu for stage in measured.stages), "loader": measured.loader.cpu,
                       "remainder": measured.remainder_ms}
    plain["need"], plain["need_from"], plain["headroom"] = measured.need, profile.need_from, measured.headroom
    both = measured.together
    plain["together"] = None if both is None else {**dataclasses.asdict(both), "rate": both.rate, "of_slower": both.rate / min(
        measured.loader.rate, measured.need or measured.loader.rate)}
    plain["met"] = profile.met
    plain["verdict"] = dataclasses.asdict(profile.verdict)
    plain["sweep"] = [{"settings": settings, "rate": rate, "cpu_ms": cpu} for settings, rate, cpu in profile.sweep]
    plain["compared"] = {name: {"rates": rates, "rate": statistics.median(rates)} for name, rates in profile.compared.items()}
    plain["absent"] = profile.absent
    return plain


def _stage(stage: Stage) -> dict[str, Any]:
    return {**dataclasses.asdict(stage), "rate": stage.rate, "cpu": stage.cpu, "mb_s": stage.mb_s,
            "core_rate": stage.core_rate if stage.cpu else None}


def _whole(loader: EndToEnd) -> dict[str, Any]:
    return {**dataclasses.asdict(loader), "rate": loader.rate, "cpu": loader.cpu}


def write_json(profile: Profile, path: Path) -> None:
    """Write `figures` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures(profile), indent=1) + "\n", encoding="utf-8")


def show(profile: Profile, stream: IO[str]) -> None:
    """Print everything for a person."""
    from rich.console import Console

    plain = Console(file=stream)
    console = Console(file=stream, highlight=False, width=None if plain.is_terminal else 120)
    console.print(f"[bold]{profile.title}[/bold]", markup=True)
    _show_stages(console, profile)
    _show_whole(console, profile)
    for line in _need_lines(profile):
        console.print(line, markup=False)
    _show_lists(console, profile)
    console.print()
    console.print("verdict: " + profile.verdict.sentence, style="bold", markup=False)
    console.print("advice, to paste into the recipe" + (" (where it differs from the sweep, take the sweep's):"
                                                        if profile.sweep else ":"), markup=False)
    console.print(textwrap.indent(profile.verdict.advice_yaml.rstrip(), "    "), markup=False, soft_wrap=True)


def _show_stages(console: Console, profile: Profile) -> None:
    from rich.table import Table

    table = Table(title="stages, each alone", title_justify="left")
    for name in ("stage", "threads", "img/s", "min…max", "img/s of one core", "CPU ms/img", "MB/s", "img/s up to here"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    upto = {stage.name: stage for stage in profile.cumulative}
    for stage in profile.measured.stages:
        there = upto.get(stage.name)
        table.add_row(stage.name, str(stage.threads), f"{stage.rate:,.0f}", spread(stage.rates),
                      f"{stage.core_rate:,.0f}" if stage.cpu else "", f"{stage.cpu:.3f}",
                      f"{stage.mb_s:,.0f}" if stage.mb_s else "",
                      f"{there.rate:,.0f}" if there else "")
    console.print(table)
    measured = profile.measured
    total = sum(stage.cpu for stage in measured.stages)
    share = measured.remainder_ms / measured.loader.cpu if measured.loader.cpu else 0.0
    console.print(f"CPU ms an image: the stages {total:.3f}, end to end {measured.loader.cpu:.3f}, remainder "
                  f"{measured.remainder_ms:+.3f} ({share:+.1%})", markup=False)


def _show_whole(console: Console, profile: Profile) -> None:
    from rich.table import Table

    table = Table(title="the loader, end to end", title_justify="left")
    for name in ("page cache", "img/s", "min…max", "CPU ms/img", "ms a batch p50", "p95", "p99", "max", "waited", "while"):
        table.add_column(name, justify="right")
    for name, whole in (("warm", profile.measured.loader), ("cold", profile.cold)):
        if whole is not None:
            table.add_row(name, f"{whole.rate:,.0f}", spread(whole.rates), f"{whole.cpu:.3f}",
                          *(f"{value:.1f}" for value in whole.latency_ms), f"{whole.waited:.0%}", causes(whole.causes))
    console.print(table)
    if profile.cold_note:
        console.print(f"cold: {profile.cold_note}", markup=False)
    before, after, peak = profile.measured.loader.rss_mb
    if peak:
        console.print(f"memory: {before:,.0f} MB before, {after:,.0f} after, {peak:,.0f} at most", markup=False)
    depth = profile.measured.loader.depth
    if depth:
        ready = [count for _, count in depth]
        console.print(f"batches ready when asked: {sparkline(ready)}  mean {statistics.mean(ready):.2f}, at most {max(ready)}",
                      markup=False)


def _need_lines(profile: Profile) -> Iterable[str]:
    measured = profile.measured
    if measured.need is None:
        yield "need: not asked for (--model measures the network's, --need N states it)"
        return
    yield f"need: {measured.need:,.0f} img/s ({profile.need_from}); head-room {measured.headroom:.2f}× (loader alone ÷ need)"
    both = measured.together
    if both is not None:
        slower = min(measured.need, measured.loader.rate)
        yield (f"together: {both.rate:,.0f} img/s ({spread(both.rates)}), {both.rate / slower:.2f} of the slower alone, "
               f"{both.rate / measured.need:.2f} of the need; waited {both.waited:.1%} of the time"
               + (f", meanwhile the loader was at: {causes(both.causes)}" if both.causes else ""))


def _show_lists(console: Console, profile: Profile) -> None:
    if profile.compared:
        console.print("the same work in turns, each in a process of its own:", markup=False)
        ours = statistics.median(next(iter(profile.compared.values())))
        for name, rates in sorted(profile.compared.items(), key=lambda item: -statistics.median(item[1])):
            rate = statistics.median(rates)
            console.print(f"  {name:45} {rate:9,.0f} img/s  ({spread(rates)})  {rate / ours:.2f} of this loader", markup=False)
        for line in profile.absent:
            console.print(f"  did not run: {line}", markup=False)
    if profile.sweep:
        console.print("sweep, best first:", markup=False)
        for settings, rate, cpu in profile.sweep[:10]:
            said = ", ".join(f"{name} {value:g}" for name, value in settings.items())
            console.print(f"  {said:60} {rate:9,.0f} img/s  {cpu:6.3f} CPU ms", markup=False)
        console.print("best setting:", markup=False)
        console.print(textwrap.indent(sweep_yaml(profile).rstrip(), "    "), markup=False, soft_wrap=True)


def sweep_yaml(profile: Profile) -> str:
    """The best setting of a sweep as YAML to paste, its figures as a comment."""
    settings, rate, cpu = profile.sweep[0]
    worst = min(point[1] for point in profile.sweep)
    lines = [f"# {rate:,.0f} img/s, {cpu:.3f} CPU ms an image; the slowest of {len(profile.sweep)} settings gave {worst:,.0f}",
             "machine:"]
    lines += [f"  {name}: {value:g}" for name, value in settings.items() if name != "batch"]
    if "batch" in settings:
        lines.append(f"# measured with train.batch {settings['batch']:g}, which is part of the recipe: it changes results")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):,.0f}…{max(values):,.0f}"


def causes(shares: dict[str, float]) -> str:
    """States and their shares, largest first, those above 1%."""
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share > 0.01)


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """A line of bars: the mean of each of at most `width` equal pieces."""
    top = max([1.0, *values])
    edges = [len(values) * i // width for i in range(width + 1)] if len(values) > width else list(range(len(values) + 1))
    means = [statistics.mean(values[low:high]) for low, high in zip(edges, edges[1:])]
    return "".join(_BARS[round(mean / top * (len(_BARS) - 1))] for mean in means)


def plot(profile: Profile, path: Path) -> None:
    """Write a PNG: stages as bars of img/s (logarithmic), the loader on top, the need as a line."""
    from train.figures.kernels import need_matplotlib

    need_matplotlib()
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
    medians = [statistics.median(rates) for _, rates, _ in bars]
    places = range(len(bars), 0, -1)
    axes.barh(list(places), medians, color=[colour for _, _, colour in bars], height=0.7,
              xerr=[[middle - min(rates) for middle, (_, rates, _) in zip(medians, bars)],
                    [max(rates) - middle for middle, (_, rates, _) in zip(medians, bars)]], ecolor="#555555", capsize=2)
    axes.set_yticks(list(places), [name for name, _, _ in bars])
    axes.set_xscale("log")
    low, high = min([*medians, measured.need or medians[0]]), max([*medians, measured.need or medians[0]])
    axes.set_xlim(low / 2, high * 4)
    for place, (_, rates, _), middle in zip(places, bars, medians):
        axes.text(max(rates) * 1.08, place, f"{middle:,.0f}", va="center", fontsize=8)
    if measured.need:
        axes.axvline(measured.need, color="#2a9d4a", linewidth=2)
        axes.text(measured.need * 1.06, len(bars) + 0.72, f"need {measured.need:,.0f}", color="#2a9d4a", fontsize=9)
    axes.set_ylim(0.4, len(bars) + 1.2)
    axes.set_xlabel("images per second (logarithmic); whiskers: smallest and largest repeat")
    figure.suptitle(f"{profile.title}\n" + "\n".join(textwrap.wrap(profile.verdict.sentence, 125)), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def trace(events: Sequence[Event], depths: Sequence[tuple[float, int]] = ()) -> dict[str, Any]:
    """Events as the Trace Event Format: a track a thread, complete events (ph "X") in µs, steps as arguments; and the queue as
    a counter. chrome://tracing and ui.perfetto.dev open it."""
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


def write_trace(events: Sequence[Event], depths: Sequence[tuple[float, int]], path: Path) -> None:
    """Write `trace` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace(events, depths)) + "\n", encoding="utf-8")
