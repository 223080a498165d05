"""The report of tools/gpu_report.py as a page with plots, and as Markdown. What a report lacks is left out; errors are shown."""
from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import style
from matplotlib.figure import Figure

from model.alexnet import paper
from tools import roofline

HERE = Path(__file__).resolve().parent
Found = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heads, rows

STYLE: Any = {  # matplotlib's type lists all its settings
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#d8d9da", "legend.frameon": False}


@dataclass
class Section:
    """A part of the page. `words`: columns that hold words, all others are figures."""
    title: str
    note: str = ""
    error: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[tuple[str, bytes]] = field(default_factory=list)
    words: tuple[int, ...] = (0,)


def dots(values: Mapping[str, Mapping[str, float]], unit: str, lines: Mapping[str, float] = {}) -> bytes:
    """A row for each label with a dot for each of its series, on a logarithmic axis, its figure at the right end of the row;
    vertical lines. As SVG."""
    series = list(dict.fromkeys(name for one in values.values() for name in one))
    with style.context(["tableau-colorblind10", STYLE]):
        figure = Figure(figsize=(6.4, 1.1 + 0.2 * len(values) * max(1.5, len(series))), dpi=72, layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel=unit, ylim=(len(values) - 0.5, -0.5), yticks=range(len(values)),
                                  yticklabels=list(values))
        for number, name in enumerate(series):
            rows = [row for row, one in enumerate(values.values()) if one.get(name)]
            places = [row + (number + 0.5) / len(series) - 0.5 for row in rows]
            found = [list(values.values())[row][name] for row in rows]
            axes.plot(found, places, "o", color=f"C{number}", markersize=5, label=name)
            for at, value in zip(places, found):  # in a column of their own, so that they meet neither dots nor lines
                axes.annotate(f"{value:,.0f}", (1, at), xycoords=("axes fraction", "data"), xytext=(4, 0), fontsize=7,
                              textcoords="offset points", va="center", color=f"C{number}")
        for dashes, (name, value) in zip(("--", ":", "-."), lines.items()):
            axes.axvline(value, color="black", linewidth=1, linestyle=dashes, label=f"{name}: {value:,.0f}")
        axes.margins(x=0.08)
        if len(series) + len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


# --- figures in words

def rate(figure: Found | None) -> str:
    """A median with its range."""
    return f"{figure['median']:,.0f} ({figure['least']:,.0f}–{figure['most']:,.0f})" if figure else "–"


def share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def tail(one: Found) -> str:
    """p99 ÷ p50 of a step's time."""
    return f"{one['p99_ms'] / one['p50_ms']:.3f}"


def results(report: Found, stage: str) -> Found:
    return dict(report["stages"].get(stage, {}).get("results", {}))


def parted(section: Section, found: Mapping[str, Found], prefix: str = "") -> Found:
    """What ran; the errors of the rest go into the section."""
    section.error += "".join(f"{prefix}{name}: {one['error']}. " for name, one in found.items() if one.get("error"))
    return {name: one for name, one in found.items() if not one.get("error")}


def limits(report: Found, batch: int) -> dict[str, float]:
    """Images/s that the card's measured peaks would allow the paper's network; none at toy sizes."""
    peaks = results(report, "environment").get("peaks")
    if report["small"] or not peaks:
        return {}
    card, layers = roofline.Card("", peaks["flop_s"], peaks["bytes_s"]), roofline.work(paper())
    return {name: roofline.limit(layers, batch, card, fused=fused).images_s
            for name, fused in (("limit, fused", True), ("limit, unfused", False))}


# --- sections

def steps(report: Found) -> Section:
    section = Section("The training step", "Forward, backward and update on noise; variants of a batch take turns. A step's "
                      "time is the device's own.")
    rows = []
    for batch, found in results(report, "steps").items():
        limit, ran = limits(report, int(batch)), parted(section, found, f"batch {batch}, ")
        for name, one in ran.items():
            median, over = one["images_s"]["median"], one.get("over_plain")
            rows.append((name, batch, rate(one["images_s"]), share(median / limit["limit, fused"] if limit else None, 0),
                         f"{over['median']:.2f}×" if over else "–", f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}", tail(one)))
        if ran:
            section.charts.append((f"training step, batch {batch}", dots(
                {name: {"img/s": one["images_s"]["median"]} for name, one in ran.items()}, "images per second", limit)))
    section.tables.append((("step", "batch", "img/s, median (range)", "of the fused limit", "over plain PyTorch", "p50 ms",
                            "p99 ms", "p99 ÷ p50"), rows))
    return section


def tiers(report: Found) -> Section:
    section = Section("Loader and network", "The loader alone, the network on synthetic batches, and both together, in turns. "
                      "Stall: share of the time spent waiting for the loader.", words=(0, 6))
    found = parted(section, results(report, "tiers"))
    section.tables.append((("tier", "alone, img/s", "synthetic, img/s", "together, img/s", "together ÷ synthetic", "stall",
                            "causes", "host waits for the device, a step", "p99 ÷ p50"), [
        (name, rate(one["alone"]), rate(one["synthetic"]), rate(one["images_s"]), f"{one['of_synthetic']['median']:.3f}",
         share(one["stall"]), ", ".join(f"{stage} {share(value)}" for stage, value in one["causes"].items()),
         str(one["synchronisations"]["per_step"]), tail(one)) for name, one in found.items()]))
    section.tables.append((("where the host waited", "times"), [
        (place, str(count)) for one in found.values() for place, count in one["synchronisations"]["where"].items()]))
    if found:
        section.charts.append(("loader and network", dots({
            name: {"alone": one["alone"]["median"], "synthetic": one["synthetic"]["median"],
                   "together": one["images_s"]["median"]} for name, one in found.items()}, "images per second")))
    return section


def trainings(report: Found) -> Section:
    section = Section("Whole trainings", "python -m train.main with its metrics and checkpoint: the second half of the steps. "
                      "Synthetic: of the same tier, above.")
    rows = []
    for name, one in parted(section, results(report, "trainings")).items():
        alone = results(report, "tiers").get(name, {}).get("synthetic")
        rows.append((name, str(one["steps"]), rate(one["images_s"]),
                     f"{one['images_s']['median'] / alone['median']:.3f}" if alone else "–", share(one["waited"])))
    section.tables.append((("tier", "steps", "img/s, median (range)", "÷ synthetic", "waited, at the end"), rows))
    return section


def decoder(report: Found) -> Section:
    section = Section("The decoder", "Decoded and thrown away; crops are not resized. Load: share of the hardware engine. Fancy: "
                      "chroma interpolated, as on CPUs. Decoders: how often nvImageCodec's log names each for a batch or two.",
                      words=(0, 2, 3))
    found, smoke = parted(section, results(report, "decoder")), results(report, "smoke")
    section.tables.append((("images, way", "img/s, median (range)", "decoders", "warnings"), [
        (name, rate(found.get(name, {}).get("images_s")),
         ", ".join(f"{who} {count}" for who, count in smoke.get(name, {}).get("decoders", {}).items()),
         smoke.get(name, {}).get("error") or "; ".join(smoke.get(name, {}).get("warnings", []))) for name in found | smoke]))
    groups: dict[str, dict[str, float]] = {}
    for name, one in found.items():
        way, _, load = name.rpartition(", ")
        groups.setdefault(way, {})[load] = one["images_s"]["median"]
    if groups:
        section.charts.append(("the decoder alone", dots(groups, "images per second")))
    return section


def trace(report: Found) -> Section:
    section = Section("Where a step's time goes", "One step under torch.profiler, which slows the host: times are of kernels "
                      "(without a GPU: of operators).")
    found = parted(section, results(report, "trace"))
    section.tables.append((("step", "kernels' ms", "wall ms", "launches"), [
        (name, f"{one['device_us'] / 1e3:.3f}", f"{one['wall_us'] / 1e3:.3f}", f"{one['launches']:,}")
        for name, one in found.items()]))
    for name, one in found.items():
        layers = {layer: {"µs": us} for layer, us in sorted(one["layers"].items()) if us >= 1}
        if layers:
            section.charts.append((f"{name}: µs by layer", dots(layers, "µs")))
        section.tables.append(((f"{name}: kernel", "calls", "µs"), [
            (kernel["name"], f"{kernel['calls']:,}", f"{kernel['us']:,.0f}") for kernel in one["kernels"][:12]]))
    return section


def tests(report: Found) -> Section:
    found = results(report, "tests") | results(report, "exact")
    keys = ("tests", "failures", "errors", "skipped", "exit_code")
    return Section("Tests on the device", tables=[
        (("tests", *keys), [(name, *(str(one.get(key, "–")) for key in keys)) for name, one in found.items()]),
        (("failed", "says"), [pair for one in found.values() for pair in one.get("failed", {}).items()])])


def environment(report: Found) -> Section:
    groups = results(report, "environment") | {"images": results(report, "data")}
    return Section("Environment", words=(0, 1), tables=[(("what", "value"), [
        (f"{group}: {name}", f"{value:.4g}" if isinstance(value, float) else str(value)) for group, values in groups.items()
        for name, value in (values if isinstance(values, dict) else {"": values}).items()])])


SECTIONS: dict[str, Callable[[Found], Section]] = {
    "steps": steps, "tiers": tiers, "trainings": trainings, "decoder": decoder, "trace": trace, "tests": tests,
    "environment": environment}


def sections(report: Found) -> Iterator[Section]:
    """How the stages ended; then all that the report has something of."""
    yield Section("Stages", words=(0, 2), tables=[(("stage", "seconds", "ended"), [
        (name, f"{one['seconds']:.0f}", one["error"] or "done") for name, one in report["stages"].items()])])
    for stage, make in SECTIONS.items():
        if results(report, stage):
            section = make(report)
            section.tables = [(heads, rows) for heads, rows in section.tables if rows]
            yield section


def lead(report: Found) -> list[str]:
    about = results(report, "environment")
    card, commit = about.get("card", {}).get("name", "unknown device"), about.get("commit", "unknown")
    return [*["Toy sizes on a CPU, to see that it works: no figure here means anything."] * report["small"],
            f"{card}, {report['started']}, commit {commit}, {report['seconds']:.0f} s: {report['command']}"]


def html(report: Found) -> str:
    """The page: self-contained, no script."""
    places = jinja2.FileSystemLoader([HERE, HERE.parents[1] / "train" / "report"])
    made = jinja2.Environment(loader=places, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    made.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return made.get_template("gpu_page.html.jinja").render(title="AlexNet on one GPU", lead=lead(report), warn=report["small"],
                                                           sections=list(sections(report)))


def markdown(report: Found) -> str:
    """The tables, for docs/results."""
    lines = ["# AlexNet on one GPU", *(f"\n{line}" for line in lead(report))]
    for section in sections(report):
        lines += ["", f"## {section.title}", *(f"\n{text}" for text in (section.note, section.error) if text)]
        for heads, rows in section.tables:
            head, *body = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (heads, *rows))
            lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in body)]
    return "\n".join(lines) + "\n"
