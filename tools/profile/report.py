"""Shows a profile of the loader: tables on a terminal, JSON, a trace for chrome://tracing or Perfetto.

Rates are images/s, with the smallest and largest of the rounds beside their median.
"""
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from tools.cli import versions
from tools.profile.host import Host
from tools.profile.measure import Figures
from tools.profile.verdict import Measured, Setup, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.monitor import Event


@dataclass(frozen=True)
class Profile:
    """All that one run of tools/profile_pipeline.py measured."""
    title: str  # what was profiled
    batch: int  # images of a batch
    measured: Measured
    setup: Setup
    verdict: Verdict
    cumulative: tuple[Figures, ...] = ()  # the loader cut off after each stage
    cold: Figures | None = None  # the loader after the page cache was emptied
    cold_note: str = ""
    need_from: str = ""  # where the need comes from
    host: Host | None = None  # None where squares lie in GPU memory


def as_json(profile: Profile) -> dict[str, Any]:
    """Everything as plain values: rounds under their own names, medians beside them."""
    def plain(figures: Figures | None) -> dict[str, Any] | None:
        return None if figures is None else asdict(figures) | {"rate": figures.rate, "cpu": figures.cpu}

    measured = profile.measured
    return {"title": profile.title, "batch": profile.batch, "facts": asdict(profile.setup), "versions": versions(),
            "stages": list(map(plain, measured.stages)), "cumulative": list(map(plain, profile.cumulative)),
            "loader": plain(measured.loader), "cold": plain(profile.cold), "cold_note": profile.cold_note,
            "cpu_ms": {"stages": measured.stages_cpu, "loader": measured.loader.cpu,
                       "remainder": measured.loader.cpu - measured.stages_cpu},
            "host": profile.host and {**asdict(profile.host), "ceiling": profile.host.ceiling},
            "need": measured.need, "need_from": profile.need_from, "headroom": measured.headroom,
            "together": plain(measured.together), "met": measured.met, "verdict": asdict(profile.verdict)}


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
    measured, together = profile.measured, profile.measured.together
    console.print("need: not asked for (--model measures the network's, --need N states it)" if measured.need is None else
                  f"need: {measured.need:,.0f} img/s ({profile.need_from}); headroom {measured.headroom:.2f}× (loader ÷ need)")
    if together is not None:
        causes = f", meanwhile the loader was at: {shares(together.causes)}" if together.causes else ""
        who = "a consumer of that rate" if measured.stated else "together"
        console.print(f"{who}: {together.rate:,.0f} img/s ({extremes(together.rates)}), {measured.met:.2f} of the need; stall "
                      f"{together.waited:.1%} of the time{causes}")
    console.print("\nverdict: " + profile.verdict.sentence, style="bold")
    console.print("advice, to paste into the recipe:")
    console.print(textwrap.indent(profile.verdict.advice_yaml.rstrip(), "    "), soft_wrap=True)


def _show_stages(console: "Console", profile: Profile) -> None:
    cumulative = {stage.name: f"{stage.rate:,.0f}" for stage in profile.cumulative}
    heads = "stage", "threads", "img/s", "min…max", "CPU ms/img", "MB/s", "img/s up to here"
    _print_table(console, "stages, each alone", heads, [
        (stage.name, str(stage.threads), f"{stage.rate:,.0f}", extremes(stage.rates), f"{stage.cpu:.3f}",
         f"{stage.mb_s:,.0f}" if stage.mb_s else "", cumulative.get(stage.name, "")) for stage in profile.measured.stages])
    stages, whole = profile.measured.stages_cpu, profile.measured.loader.cpu
    console.print(f"CPU ms an image: the stages {stages:.3f}, end to end {whole:.3f}, remainder {whole - stages:+.3f}")
    if (host := profile.host) is not None:
        console.print(f"host ceiling: {host.ceiling:,.0f} img/s ({host.lock_us:.1f} CPU µs an image, pixels and bytes free; "
                      f"{host.cpu_us:.1f} with the bytes and DALI's threads)")


def _show_loader(console: "Console", profile: Profile) -> None:
    measured = [("warm", profile.measured.loader), *([("cold", profile.cold)] if profile.cold is not None else [])]
    _print_table(console, "the loader, end to end",
                 ("page cache", "img/s", "min…max", "CPU ms/img", "ms a batch p50", "p95", "p99", "max", "stall"), [
                     (name, f"{figures.rate:,.0f}", extremes(figures.rates), f"{figures.cpu:.3f}",
                      *(f"{value:.1f}" for value in figures.latency_ms), f"{figures.waited:.0%}") for name, figures in measured])
    for name, figures in measured:
        console.print(f"{name}: the loader was at {shares(figures.causes)}")
    if profile.cold_note:
        console.print(f"cold: {profile.cold_note}")


def _print_table(console: "Console", title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that 80 columns hold: heads wrap, figures do not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        width = max(len(row[number]) for row in rows)
        table.add_column(head, justify="right" if number else "left", min_width=width, no_wrap=width >= len(head))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def extremes(values: Sequence[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):,.0f}…{max(values):,.0f}"


def shares(causes: dict[str, float]) -> str:
    """Stages and their shares, largest first, those above 1%."""
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(causes.items(), key=lambda item: -item[1]) if share > 0.01)


def trace(events: "Sequence[Event]") -> dict[str, Any]:
    """Events in the Trace Event Format (chrome://tracing, ui.perfetto.dev): a track a thread, complete events (ph "X") in µs, the
    step as argument."""
    start = min((event.start_s for event in events), default=0.0)
    tracks = {name: number for number, name in enumerate(dict.fromkeys(event.thread for event in events), 1)}
    lines: list[dict[str, Any]] = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}}
                                   for name, number in tracks.items()]
    lines += [{"name": event.name, "cat": "loader", "ph": "X", "ts": (event.start_s - start) * 1e6,
               "dur": (event.end_s - event.start_s) * 1e6, "pid": 1, "tid": tracks[event.thread], "args": {"step": event.step}}
              for event in sorted(events, key=lambda event: event.start_s)]
    return {"displayTimeUnit": "ms", "traceEvents": lines}
