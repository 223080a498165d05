"""The HTML page of a report: page.html.jinja filled in with results, comparisons, curves and kernels."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from train.figures import kernels
from train.report import paper, plots
from train.report.compare import Ablation, Comparison, Difference, Ensemble, Speedup, beside, five, ten_crops
from train.report.groups import Group, Stat, by_images, stat
from train.report.runs import Run, Test
from train.run_folder import CHECKPOINTS

NONE = "–"  # a figure that is not there
MOST_SHEETS = 12  # of kernels; of more groups only the best one's
Cells = tuple[str | None, ...]
Fact = tuple[str, object]


def render(title: str, made: float, compared: Comparison, problems: Sequence[str], pictures: Iterable[tuple[str, Path]]) -> str:
    """The page. Raises RuntimeError without matplotlib.

    Args:
        made: seconds since 1970.
        problems: what could not be read or compared, besides what the runs know of themselves.
        pictures: caption and PNG or JPEG.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, finalize=lambda value: NONE if value is None else value)
    environment.filters |= {"base64": lambda data: base64.b64encode(data).decode(), "yaml": to_yaml,
                            **{function.__name__: function for function in (
                                breakable, commit, crops, facts, hashes, lines, number, percent, points, when)}}
    groups = compared.groups
    runs = [(run, group) for group in groups for run in group.runs]
    problems = [f"{run.name if len(group.runs) > 1 else group.name} (seed {run.seed}): {note}"
                for run, group in runs for note in notes(run, group)] + [*problems]
    return environment.get_template("page.html.jinja").render(
        title=title, colours=plots.COLOURS, paper=paper, compared=compared, groups=groups, problems=problems,
        runs=[run for run, _ in runs], head=head(groups, made), by_images=by_images(groups), result=result,
        paper_rows=[(row, ours(row, compared)) for row in paper.ROWS],
        speedup=speedup(compared.speedup) if compared.speedup else (None,) * 4, changes=changes(compared),
        comparisons=plots.comparisons(groups),
        charts=[(group, plots.charts(group, f"g{number}")) for number, group in enumerate(groups)],
        sheets=[sheet(run, group) for run, group in best_runs(groups)],
        pictures=[(caption, path.read_bytes()) for caption, path in pictures])


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
    if not isinstance(time, (int, float)):
        return None
    try:
        return datetime.datetime.fromtimestamp(time, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return None


def commit(start: Any, digits: int = 40) -> str | None:
    """The commit of a start, and whether the source had changes."""
    git = start.get("git")
    return f"{str(git.get('commit'))[:digits]}{' with changes' * bool(git.get('changed'))}" if isinstance(git, dict) else None


def crops(test: Test | Ensemble) -> str:
    """How it was tested."""
    return f"{test.split}, {test.views} crop{'s' * (test.views > 1)}"


def to_yaml(config: Mapping[str, Any]) -> str:
    """A recipe as text."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)


# --- sections

def head(groups: Sequence[Group], made: float) -> list[Fact]:
    """Date, number of runs, their commits and machines."""
    runs = [run for group in groups for run in group.runs]
    starts = [(run, start) for run in runs for start in run.starts]
    commits = dict.fromkeys(found for _, start in starts if (found := commit(start, 12)))
    machines = dict.fromkeys(", ".join(f"{name} {value}" for name, value in (
        ("device", start.get("device")), ("processes", start.get("processes")),
        ("precision", (run.config.get("machine") or {}).get("precision")), ("torch", start.get("torch")),
        ("DALI", start.get("dali")), ("Python", start.get("python"))) if value is not None) for run, start in starts)
    return [("made", when(made)), ("runs", f"{len(runs)}, of {len(groups)} recipe{'s' * (len(groups) > 1)}"),
            ("trained by commit", "; ".join(commits) or None), ("on", "; ".join(machines) or None)]


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
    return [*([] if run.test else [run.state]),
            *(["its test is at chance: it learned nothing, or its labels are in another order"] if run.at_chance else []),
            *([] if run in group.counted else ["another run of this seed is counted in its place"]), *run.problems]


def ours(row: paper.Row, compared: Comparison) -> list[Cells]:
    """Top-1 error, top-5 error and name of each result beside a row of the paper's."""
    if row.key == paper.FIVE:
        return [(percent(one.top1), percent(one.top5), breakable(one.group.name)) for one in five(row, compared.ensembles)]
    cells: list[Cells] = []
    for group, tests in beside(row, compared.groups):
        states = dict.fromkeys(run.state if not run.test else "not tested with ten crops"
                               for run in group.counted if ten_crops(run, row) is None)
        seeds = [f"{len(tests)} seed{'s' * (len(tests) > 1)}"] if tests else []
        cells.append((percent(stat(test.top1 for test in tests)), percent(stat(test.top5 for test in tests)),
                      breakable(group.name) + f": {'; '.join([*seeds, *states])}"))
    return cells


def speedup(found: Speedup) -> Cells:
    """How many times sooner ReLU is, epochs of both, and the runs."""
    sides = (found.relu, found.relu_epochs), (found.tanh, found.tanh_epochs)
    means = [epochs.mean for group, epochs in sides if epochs and epochs.n == len(group.counted)]
    cells = ["not reached" if epochs is None else f"{number(epochs, 1)}" if epochs.n == len(group.counted)
             else f"{number(epochs, 1)} ({epochs.n} of {len(group.counted)} runs)" for group, epochs in sides]
    return f"{means[1] / means[0]:.1f}" if len(means) == 2 else None, *cells, Markup(", ").join(
        breakable(group.name) for group, _ in sides)


def changes(compared: Comparison) -> list[tuple[Group | None, list[Group], list[Ablation], list[Ensemble]]]:
    """For each data set: a full network on it, all full networks that something is compared with, and what is."""
    averages = [one for one in compared.ensembles if one.group.experiment == paper.FULL]
    references = [*(one.group for one in averages), *(one.full for one in compared.ablations)]
    return [(full, list({id(group): group for group in references if group.images == images}.values()),
             [one for one in compared.ablations if one.full.images == images],
             [one for one in averages if one.group.images == images])
            for images, full in {group.images: group for group in references}.items()] or [(None, [], [], [])]


def best_runs(groups: Sequence[Group]) -> list[tuple[Run, Group]]:
    """The best run of each group that has a checkpoint; of many groups only the best of all."""
    def error(run: Run) -> float:
        return run.best.validation_error if run.best and run.best.validation_error is not None else float("inf")

    found = [(min(runs, key=error), group) for group in groups if (runs := [run for run in group.runs if run.best])]
    return [min(found, key=lambda pair: error(pair[0]))] if len(found) > MOST_SHEETS else found


def sheet(run: Run, group: Group) -> dict[str, Any]:
    """The kernels of a run's best checkpoint, or why they cannot be shown."""
    assert run.best is not None
    try:
        weights, towers = kernels.conv1(run.folder / CHECKPOINTS / run.best.name)
        chroma = kernels.chroma_lines(*kernels.tower_chroma(weights, towers))
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        return {"problem": f"{run.name}: kernels cannot be shown: {error}"}
    below = ", tower a above, tower b below" if towers == 2 else ""
    return {"png": kernels.png(kernels.sheet(weights, towers)), "alt": f"{len(weights)} kernels of conv1",
            "caption": [f"{group.name}, seed {run.seed}, {run.best.name}{below}", *chroma]}


def facts(run: Run) -> list[Fact]:
    """What a run is, and its problems."""
    command, (first, last) = run.start("command"), run.when or (None, None)
    return [("folder", run.folder), ("state", run.state), ("seed", run.seed), ("first line", when(first)),
            ("last line", when(last)), ("command", " ".join(map(str, command)) if isinstance(command, list) else None),
            *((f"problem {number}", problem) for number, problem in enumerate(run.problems, start=1))]


def hashes(run: Run) -> list[Fact]:
    """What identifies its data, recipe and checkpoints."""
    return [("index", run.start("index")), ("training images", run.images_sha256 or None), ("statistics", run.start("stats")),
            ("fingerprint of the recipe", run.start("fingerprint")),
            *((f"manifest of {saved.name}", saved.manifest) for saved in run.checkpoints)]
