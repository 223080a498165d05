"""The other parts of a report: what stands at its head, curves, kernels, pictures, and everything about each run."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from train.figures import kernels
from train.report import html, plots
from train.report.facts import Run
from train.report.groups import Group, by_images
from train.report.html import NONE, text
from train.run_folder import CHECKPOINTS

PREFIX = 12  # digits of a commit at the head of the page
MANY = 12  # groups; of more, only the best one's kernels are shown
_STARTS = ("start", "at step", "device", "processes", "Python", "torch", "DALI", "NumPy", "commit")
_TESTS = ("test", "split", "images", "views", "top-1 error, %", "top-5 error, %", "loss")
_KERNELS = ("Each kernel is stretched to all grey levels. In the paper (figure 3) those of one tower are colour-agnostic, those "
            "of the other colour-specific.")


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


def head(groups: Sequence[Group], made: float) -> str:
    """What stands under the title: date, number of runs, commits, machines."""
    runs = [run for group in groups for run in group.runs]
    starts = [(run, start) for run in runs for start in run.starts]
    commits = dict.fromkeys(found for _, start in starts if (found := commit(start, PREFIX)))
    machines = dict.fromkeys(", ".join(f"{name} {value}" for name, value in (
        ("device", start.get("device")), ("processes", start.get("processes")),
        ("precision", (run.config.get("machine") or {}).get("precision")), ("torch", start.get("torch")),
        ("DALI", start.get("dali")), ("Python", start.get("python"))) if value is not None) for run, start in starts)
    return html.pairs([("made", when(made)), ("runs", f"{len(runs)}, of {len(groups)} recipe{'s' * (len(groups) > 1)}"),
                       ("trained by commit", "; ".join(commits) or None), ("on", "; ".join(machines) or None)])


def curves(groups: Sequence[Group]) -> str:
    """A comparison for each data set of several groups, then three charts a group."""
    several = []
    for number, (data, members) in enumerate(by_images([one for one in groups if any(run.epochs for run in one.runs)])):
        if len(members) > 1:
            title = f"validation top-1 error on {data}, means over seeds"
            several.append(html.figure(plots.draw(f"d{number}", title, plots.compared(members), columns=2), text(title)))
    parts = [_grid(several)] if several else []
    for number, group in enumerate(groups):
        parts += [f"<h3>{html.name(group.name)}</h3>", _grid(_charts(group, f"g{number}"))]
    return html.section("curves", "Curves", *parts)


def _charts(group: Group, name: str) -> list[str]:
    """Errors, learning rate and waiting of a group; before its first epoch, losses."""
    if any(run.epochs for run in group.runs):
        thin = "; thin lines are single seeds" if len(group.runs) > 1 else ""
        wanted = [("errors", f"errors by epoch{thin}", plots.errors(group)), ("rates", "learning rate", plots.rates(group)),
                  ("waiting", "waiting for the loader, by what it was for", plots.waiting(group))]
    elif any(run.steps for run in group.runs):
        wanted = [("losses", "training loss; no epoch is finished", plots.losses(group))]
    else:
        return ['<p class="note">nothing is trained yet</p>']
    return [html.figure(plots.draw(f"{name}-{kind}", f"{caption}, {group.name}", paint), text(caption))
            for kind, caption, paint in wanted]


def _grid(inner: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(inner)}</div>'


def first_kernels(groups: Sequence[Group]) -> str:
    """conv1 of the best checkpoint of each group, or, of many groups, of the best."""
    found = [(min(rated, key=_error), group) for group in groups if (rated := [run for run in group.runs if run.best])]
    if len(found) > MANY:
        found = [min(found, key=lambda pair: _error(pair[0]))]
    figures = [_sheet(run, group) for run, group in found]
    return html.section("kernels", "First kernels", f"<p>{text(_KERNELS)}</p>",
                        _grid(figures) if figures else '<p class="note">no checkpoint at hand</p>')


def _sheet(run: Run, group: Group) -> str:
    """The kernels of a run's best checkpoint, or why they cannot be shown."""
    assert run.best is not None
    try:
        weights, towers = kernels.conv1(run.folder / CHECKPOINTS / run.best.name)
        lines = kernels.chroma_lines(*kernels.tower_chroma(weights, towers))
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as error:
        return f'<p class="warn">{text(f"{run.name}: kernels cannot be shown: {error}")}</p>'
    picture = html.image(kernels.png(kernels.sheet(weights, towers)), f"{len(weights)} kernels of conv1", look="pixels")
    below = ", tower a above, tower b below" if towers == 2 else ""
    return html.figure(picture, "<br>".join(map(text, (f"{group.name}, seed {run.seed}, {run.best.name}{below}", *lines))))


def _error(run: Run) -> float:
    return run.best.validation_error if run.best and run.best.validation_error is not None else float("inf")


def pictures(found: Sequence[tuple[str, Path]]) -> str:
    """Pictures that were named on the command line: example predictions, nearest images."""
    return html.section("pictures", "Pictures", *(html.figure(html.image(path.read_bytes(), caption), text(caption))
                                                  for caption, path in found))


def all_runs(groups: Sequence[Group]) -> str:
    """Every run: where it lies, starts and versions, tests, hashes, config."""
    return html.section("runs", "Runs", *(_run(run) for group in groups for run in group.runs))


def _run(run: Run) -> str:
    start = run.starts[-1] if run.starts else {}
    command = start.get("command")
    first, last = run.when or (None, None)
    facts = [("folder", run.folder), ("state", run.state), ("seed", run.seed), ("first line", when(first)),
             ("last line", when(last)), ("command", " ".join(map(str, command)) if isinstance(command, list) else None),
             *((f"problem {number}", problem) for number, problem in enumerate(run.problems, start=1))]
    hashes = [("index", start.get("index")), ("training images", run.images_sha256 or None), ("statistics", start.get("stats")),
              ("fingerprint of the recipe", start.get("fingerprint")),
              *((f"manifest of {point.name}", point.manifest) for point in run.checkpoints)]
    config = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
    return html.folded(f"<b>{html.name(run.name)}</b>, seed {run.seed}: {text(run.state)}", html.pairs(facts), _starts(run),
                       _tests(run), html.folded("hashes (SHA-256)", f'<div class="hash">{html.pairs(hashes)}</div>'),
                       html.folded("config.yaml", f"<pre>{text(config)}</pre>"))


def _starts(run: Run) -> str:
    keys = ("resumed_at", "device", "processes", "python", "torch", "dali", "numpy")
    rows = [[text(when(line.get("time"))), *(text(line.get(key)) for key in keys), text(commit(line))] for line in run.starts]
    return html.table(f"starts of {run.name}", _STARTS, rows, left=(0, 2, 4, 5, 6, 7, 8)) if rows else ""


def _tests(run: Run) -> str:
    rows = [[text(test.source or "end of training"), text(test.split), f"{test.images:,}", str(test.views),
             f"{100 * test.top1:.2f}", f"{100 * test.top5:.2f}", NONE if test.loss is None else f"{test.loss:.4f}"]
            for test in run.tests]
    return html.table(f"tests of {run.name}", _TESTS, rows, left=(0, 1)) if rows else ""
