"""Shows what `make bench` measured: a table and JSON; tools/bench/chart.py draws it.

Of a contender its median over the rounds counts, with the smallest and largest beside it; a ratio is taken within each round,
whose turns were a minute apart, and its median counts.
"""
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.bench.contenders import CONTENDERS, KINDS
from tools.bench.rounds import Result
from tools.cli import hardware, versions
from tools.profile.measure import Spread, ratio, spread

if TYPE_CHECKING:
    from rich.console import Console


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

    plain = [{"over": one.over, "under": one.under, "value": one.value.median, "min": one.value.least, "max": one.value.most,
              "by_cpu": one.by_cpu} for one in ratios(results)]
    return {**about, "hardware": hardware(), "versions": versions(), "sides": list(map(of, results)), "ratios": plain}


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
