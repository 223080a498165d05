"""The HTML page of a report: page.html.jinja filled in with results, comparisons, curves and kernels."""

import base64
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from pipeline.io_errors import in_words
from train.evaluate.metrics import CHANCE, share_text
from train.figures import kernels
from train.report import compare, paper, plots
from train.report.compare import Ablation, Difference, Ensemble
from train.report.groups import Group, Stat, by_images, changed_values, stat
from train.report.runs import Run, Test
from train.run_folder import CHECKPOINTS

NONE = "–"  # a figure that is not there
MOST_SHEETS = 12  # of kernels
Cells = tuple[str | None, ...]


def render(groups: Sequence[Group], problems: Sequence[str]) -> str:
    """The page. `problems`: what could not be read, besides what the runs know of themselves."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: NONE if value is None else value)
    functions = (averaged, breakable, crops, lines, number, percent, points, when)
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "yaml": to_yaml,
                            **{function.__name__: function for function in functions}}
    ensembles, not_averaged = compare.ensembles(groups)
    figure_1 = compare.relu_and_tanh(groups)
    runs = [(run, group) for group in groups for run in group.runs]
    rows = [(row, ours(row, groups, ensembles)) for row in paper.ROWS]
    sheets = [sheet(group) for group in groups if any(run.best for run in group.runs)][:MOST_SHEETS]
    noted: dict[str, list[str]] = {}  # what several runs have in common is said once
    for run, group in runs:
        for note in notes(run, group):
            noted.setdefault(note, []).append(f"{run.name if len(group.runs) > 1 else group.name} (seed {run.seed})")
    by_error = [(data, sorted(members, key=error)) for data, members in by_images(groups)]
    data_sets = [(data, members, plots.comparison(members)) for data, members in by_error]
    return environment.get_template("page.html.jinja").render(
        paper=paper, groups=groups, ensembles=ensembles, made=datetime.datetime.now().timestamp(), runs=[run for run, _ in runs],
        problems=[*(f"{', '.join(names)}: {note}" for note, names in noted.items()), *problems, *not_averaged],
        data_sets=data_sets, result=result, headline=headline, changed_values=changed_values, from_paper=from_paper,
        paper_rows=[(row, found) for row, found in rows if found], speedup=speedup(*figure_1) if figure_1 else None,
        figure_1=plots.figure_1(figure_1 or ()), changes=changes(compare.ablations(groups), ensembles), details=plots.details,
        axes=plots, sheets=sheets)


# --- figures in words

def breakable(name: str) -> Markup:
    """A name of a run or recipe that may be broken after its separators."""
    return Markup(str(escape(name)).replace("_", "_<wbr>").replace("-", "-<wbr>"))


def lines(values: Iterable[str | None]) -> Markup | str:
    """Each on a line of its own."""
    return Markup("<br>").join(NONE if value is None else value for value in values) or NONE


def number(found: Stat | float | None, digits: int = 0, scale: float = 1) -> str | None:
    """A mean, with its standard deviation."""
    if found is None:
        return None
    mean, sd = (found.mean, found.sd) if isinstance(found, Stat) else (found, None)
    return f"{scale * mean:,.{digits}f}" + ("" if sd is None else f" ± {scale * sd:,.{digits}f}")


def percent(found: Stat | float | None, digits: int = 2) -> str | None:
    """A mean of shares in percent, with its standard deviation."""
    return number(found, digits, 100)


def points(found: Difference | None) -> str | None:
    """A difference of shares in percentage points, with half of its 95% interval."""
    if found is None:
        return None
    return f"{100 * found.mean:+.2f}".replace("-", "−") + ("" if found.half is None else f" ± {100 * found.half:.2f}")


def when(time: object) -> str | None:
    """Seconds since 1970 as a date and time in UTC; None for what is none."""
    try:
        return datetime.datetime.fromtimestamp(time, datetime.timezone.utc).strftime(  # type: ignore[arg-type]  # caught
            "%Y-%m-%d %H:%M UTC")
    except (TypeError, OverflowError, OSError, ValueError):
        return None


def crops(test: Test) -> str:
    """How it was tested."""
    return f"{test.split}, {test.views} crop{'s' * (test.views > 1)}"


def to_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)


# --- sections

def error(group: Group) -> float:
    """By which groups are sorted: the mean top-1 error of test, else of the last validation."""
    found = group.stat("test_top1") or group.stat("validation_top1")
    return found.mean if found else math.inf


def headline(members: Sequence[Group]) -> tuple[str | None, str]:
    """The error of the best of groups (sorted), and what it is of."""
    best = members[0]
    found, run = best.stat("test_top1") or best.stat("validation_top1"), next((run for run in best.furthest if run.score), None)
    if found is None or run is None or run.score is None:
        return None, "no validation or test yet"
    score, n = run.score, found.n
    what = f"(mean ± sd of {n} seeds)" if n > 1 else share_text(round(score.top1 * score.images), score.images).partition(" ")[2]
    of = f", the best of {len(members)} recipes" if len(members) > 1 else ""
    epochs = f"{len(run.epochs)} epoch{'s' * (len(run.epochs) != 1)}"
    chance = "; no better than guessing" if run.at_chance else ""
    return f"{percent(found)}%", f"top-1 error {what}, on {crops(score)}: {best.name}, {epochs}{of}{chance}"


def from_paper(members: Sequence[Group]) -> list[tuple[str, str]]:
    """In what networks depart from the paper's: names of groups, and the words they share."""
    words: dict[str, list[str]] = {}
    for group in members:
        words.setdefault(group.from_paper or "nothing", []).append(group.name)
    return [(", ".join(names), text) for text, names in words.items()]


def result(group: Group) -> Cells:
    """Seeds, epochs and test of a group."""
    counted, furthest = group.counted, group.furthest
    seeds = f"{len(furthest)} of {len(counted)}" if len(furthest) < len(counted) else str(len(counted))
    epochs = sorted({len(run.epochs) for run in counted})
    done, planned = "–".join(dict.fromkeys((str(epochs[0]), str(epochs[-1])))), counted[0].planned_epochs
    test = next((run.test for run in furthest if run.test), None)
    return seeds, done if epochs == [planned] else f"{done} of {planned}", crops(test) if test else None


def notes(run: Run, group: Group) -> list[str]:
    """What a reader must know about a run."""
    return [*([] if run.test else [run.state]), *([CHANCE] if run.at_chance else []),
            *([] if run in group.counted else ["another run of this seed is counted in its place"]),
            *(f"extended: {change}" for change in run.extended), *run.problems]


def ours(row: paper.Row, groups: Sequence[Group], ensembles: Sequence[Ensemble]) -> list[Cells]:
    """Errors and runs that stand beside a row of the paper's."""
    if row.key in (paper.FIVE, paper.SEVEN):
        return [(percent(one.top1), percent(one.top5), averaged(one)) for one in compare.averages(row, ensembles)]
    cells: list[Cells] = []
    for group in compare.matches(row, groups):
        tests = [test for run in group.counted if (test := compare.ten_crops(run, row))]
        states = dict.fromkeys(run.state if not run.test else "not tested with ten crops"
                               for run in group.counted if compare.ten_crops(run, row) is None)
        seeds = [f"{len(tests)} seed{'s' * (len(tests) > 1)}"] if tests else []
        cells.append((percent(stat(test.top1 for test in tests)), percent(stat(test.top5 for test in tests)),
                      breakable(group.name) + f": {'; '.join([*seeds, *states])}"))
    return cells


def averaged(one: Ensemble) -> Markup:
    """Whose networks are averaged."""
    return breakable(one.group.name) + (" and " + breakable(one.tuned.name) if one.tuned else Markup(""))


def speedup(relu: Group, tanh: Group) -> Cells:
    """How many times sooner ReLU is, epochs of both, and the runs."""
    sides = [(group, compare.epochs_to_error(group)) for group in (relu, tanh)]
    means = [epochs.mean for group, epochs in sides if epochs and epochs.n == len(group.counted)]
    cells = ["not reached" if epochs is None else f"{number(epochs, 1)}" if epochs.n == len(group.counted)
             else f"{number(epochs, 1)} ({epochs.n} of {len(group.counted)} runs)" for group, epochs in sides]
    return f"{means[1] / means[0]:.1f}" if len(means) == 2 else None, *cells, Markup(", ").join(
        breakable(group.name) for group, _ in sides)


def changes(ablations: Sequence[Ablation],
            ensembles: Sequence[Ensemble]) -> list[tuple[Group, list[Group], list[Ablation], list[Ensemble]]]:
    """For each data set: a full network on it, all full networks that something is compared with, and what is."""
    averages = [one for one in ensembles if one.group.experiment == paper.FULL and one.tuned is None]
    references = [*(one.group for one in averages), *(one.full for one in ablations)]
    return [(full, list({id(group): group for group in references if group.images == images}.values()),
             [one for one in ablations if one.full.images == images], [one for one in averages if one.group.images == images])
            for images, full in {group.images: group for group in references}.items()]


def sheet(group: Group) -> dict[str, Any]:
    """The kernels of the best checkpoint of a group's best run, or why they cannot be shown."""
    best, run = min(((run.best, run) for run in group.runs if run.best),
                    key=lambda pair: math.inf if pair[0].validation_error is None else pair[0].validation_error)
    try:
        weights, towers = kernels.conv1(run.folder / CHECKPOINTS / best.name)
        chroma = kernels.chroma_lines(weights, towers)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        return {"problem": f"{run.name}: kernels cannot be shown: {in_words(error)}"}
    below = ", tower a above, tower b below" if towers == 2 else ""
    return {"png": kernels.png(kernels.sheet(weights, towers)), "alt": f"{len(weights)} kernels of conv1",
            "caption": [f"{group.name}, seed {run.seed}, {best.name}{below}", *chroma]}
