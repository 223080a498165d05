"""The tables of a report: results, the paper's beside ours, what changes to the network cost."""

from __future__ import annotations

from collections.abc import Sequence

from train.report import paper, html
from train.report.facts import Run
from train.report.groups import Group, Stat, by_images, images, stat
from train.report.compare import Ablation, Ensemble, Sooner, ablations, matches, sooner, ten_crops
from train.report.html import NONE, text

_RESULTS = ("recipe", "seeds", "epochs", "test top-1 error, %", "test top-5 error, %", "test", "validation top-1 error, %",
            "validation top-5 error, %", "images/s", "waiting, % of time", "training, minutes",
            "departs from the paper’s network in")
_MEANING = ("Runs that differ only in the seed are one row: mean ± standard deviation over seeds, of those that are furthest. "
            "Validation errors are those of the last epoch. Images/s, waiting for the loader and minutes are of training, "
            "validation left out.")
_PAPER = ("experiment", "data", "paper top-1 error, %", "paper top-5 error, %", "our top-1 error, %", "our top-5 error, %",
          "our runs", "source")
_OURS = ("Ten crops. Ours stands in a row only when a run has this network, layer by layer, and as many classes, training images "
         f"and test images as this data set; “{NONE}”: not run.")
_FIGURE1 = "epochs to 25% training error, tanh over ReLU"
_CHANGES = ("change", "paper top-1, points", "paper top-5, points", "our top-1, points", "our top-5, points",
            "our top-1 error, %", "our top-5 error, %", "our seeds", "source of the paper’s figure")
_POINTS = ("Percentage points of test error more than the full network’s. After ± stands half of the 95% interval of the "
           "difference over seeds (Welch’s), where both networks have several.")


def results(groups: Sequence[Group], averaged: Sequence[Ensemble], wrong: Sequence[str]) -> str:
    """A table for each data set, a row a group and one for its networks averaged; and what is wrong with runs."""
    tables = [f"<h3>{text(words)}</h3>" + html.table(f"Results on {words}", _RESULTS, [
        row for group in members for row in (_result(group), *(_averaged(one) for one in averaged if one.group is group))],
        left=(0, 5, 11)) for words, members in by_images(groups)]
    notes = [f"{run.name if len(group.runs) > 1 else group.name} (seed {run.seed}): {note}"
             for group in groups for run in group.runs for note in _notes(group, run)]
    notes += wrong
    warned = '<ul class="warn">' + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>" if notes else ""
    return html.section("results", "Results", *tables, f'<p class="note">{text(_MEANING)}</p>', warned)


def _notes(group: Group, run: Run) -> list[str]:
    state = [] if run.test else [run.state]
    state += ["its test is at chance: it learned nothing, or its labels are in another order"] if run.at_chance else []
    twice = [] if run in group.counted else ["another run of this seed is counted in its place"]
    return [*state, *twice, *run.problems]


def _result(group: Group) -> list[str]:
    counted, furthest = group.counted, group.furthest
    seeds = f"{len(furthest)} of {len(counted)}" if len(furthest) < len(counted) else str(len(counted))
    epochs = sorted({len(run.epochs) for run in counted})
    done = "–".join(dict.fromkeys((str(epochs[0]), str(epochs[-1]))))
    tests = [run.test for run in furthest if run.test]
    tested = f"{tests[0].split}, {tests[0].views} view{'s' * (tests[0].views > 1)}" if tests else NONE
    return [html.name(group.name), seeds, done if epochs == [counted[0].asked] else f"{done} of {counted[0].asked}",
            html.percent(group.stat("test_top1")), html.percent(group.stat("test_top5")), text(tested),
            html.percent(group.stat("validation_top1")), html.percent(group.stat("validation_top5")),
            html.plain(group.stat("images_per_s")), html.percent(group.stat("waited"), 1), html.plain(group.stat("minutes"), 1),
            NONE if group.experiment == paper.FULL else text(group.departs)]


def _averaged(one: Ensemble) -> list[str]:
    return [f"{html.name(one.group.name)}, {one.members} networks averaged", str(one.members), NONE,
            html.percent(one.top1), html.percent(one.top5), text(f"{one.split}, {one.views} view{'s' * (one.views > 1)}"),
            *[NONE] * 5, ""]


def beside_the_paper(groups: Sequence[Group], averaged: Sequence[Ensemble]) -> str:
    """The paper's results, with ours where the same was run on the same data."""
    rows = [[text(row.what), text(row.on), _given(row.top1), _given(row.top5),
             *(_five(row, averaged) if row.key == paper.FIVE else _ours(row, matches(row, groups))), text(row.source)]
            for row in paper.ROWS]
    pair = sooner(groups)
    pairs = [_figure1(pair) if pair else [text(_FIGURE1), text(paper.SOONER), *[NONE] * 4]]
    return html.section("paper", "The paper’s results beside ours",
                        html.table("The paper’s results beside ours", _PAPER, rows, text(_OURS), left=(0, 1, 6, 7)),
                        "<h3>ReLU against tanh on CIFAR-10 (figure 1)</h3>",
                        html.table("ReLU against tanh", ("", "paper", "ours", "ReLU, epochs", "tanh, epochs", "our runs"), pairs,
                                   left=(0, 5)))


def _given(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}".removesuffix("0")


def _ours(row: paper.Row, groups: Sequence[Group]) -> list[str]:
    """Cells top-1, top-5 and runs; a line a group."""
    cells: list[list[str]] = [[], [], []]
    for group in groups:
        tests = [test for run in group.counted if (test := ten_crops(run, row))]
        for cell, name in zip(cells, ("top1", "top5")):
            cell.append(html.percent(stat(getattr(test, name) for test in tests)))
        seeds = [f"{len(tests)} seed{'s' * (len(tests) > 1)}"] if tests else []
        others = dict.fromkeys(run.state if not run.test else "not tested with ten crops"
                               for run in group.counted if ten_crops(run, row) is None)
        cells[2].append(f"{html.name(group.name)}: {text('; '.join([*seeds, *others]))}")
    return ["<br>".join(cell) or NONE for cell in cells]


def _five(row: paper.Row, averaged: Sequence[Ensemble]) -> list[str]:
    """The same cells, for the mean of five of the full network."""
    wanted = paper.DATA_SETS[row.data].test
    found = [one for one in averaged
             if one.members == 5 and (one.images, one.views) == (wanted, 10) and matches(row, [one.group])]
    return ["<br>".join(html.percent(getattr(one, name)) for one in found) or NONE for name in ("top1", "top5")] \
        + ["<br>".join(html.name(one.group.name) for one in found) or NONE]


def _figure1(pair: Sooner) -> list[str]:
    sides = (pair.relu_epochs, pair.relu), (pair.tanh_epochs, pair.tanh)
    means = [found.mean for found, group in sides if found and found.n == len(group.counted)]
    return [text(_FIGURE1), text(paper.SOONER), f"{means[1] / means[0]:.1f}" if len(means) == 2 else NONE,
            *(_epochs(found, len(group.counted)) for found, group in sides),
            ", ".join(html.name(group.name) for _, group in sides)]


def _epochs(found: Stat | None, runs: int) -> str:
    """Cell: epochs until the error is reached, and by how many of the runs when not by all."""
    return "not reached" if found is None else html.plain(found, 1) + (f" ({found.n} of {runs} runs)" if found.n < runs else "")


def changes(groups: Sequence[Group], averaged: Sequence[Ensemble]) -> str:
    """What a change to the network costs: ours on each data set beside the paper's."""
    found, five = ablations(groups), [one for one in averaged if one.group.experiment == paper.FULL]
    data = {images(full.runs[0]): full for full in [one.group for one in five] + [one.full for one in found]}
    parts = [f"<h3>{text(full.data)}</h3>" + _changes([one for one in found if images(one.full.runs[0]) == key],
                                                      [one for one in five if images(one.group.runs[0]) == key], full)
             for key, full in data.items()] or [_changes([], [], None)]
    return html.section("changes", "What a change to the network costs", f"<p>{text(_POINTS)}</p>", *parts)


def _changes(found: Sequence[Ablation], five: Sequence[Ensemble], full: Group | None) -> str:
    references = {id(group): group for group in [one.full for one in found] + [one.group for one in five]}
    rows = [[f"the network <small>({html.name(group.name)})</small>", *[""] * 4, *_errors(group), ""]
            for group in references.values()]
    for key, change in paper.CHANGES.items():
        given = [text(change.top1 or None), text(change.top5 or None)]
        ours = [[f"{text(change.what)} <small>({html.name(one.group.name)}: {text(one.group.departs)})</small>", *given,
                 html.points(one.top1), html.points(one.top5), *_errors(one.group), text(change.source)
                 + (f"<br>against {html.name(one.full.name)}" if len(references) > 1 else "")
                 + ("<br>at chance: nothing was learned" if any(run.at_chance for run in one.group.furthest) else "")
                 + (f"<br>also differs: {text('; '.join(one.also))}" if one.also else "")]
                for one in found if one.group.experiment == key]
        ours += [[f"{one.members} networks averaged <small>({html.name(one.group.name)})</small>", *given,
                  html.points(one.less_top1), html.points(one.less_top5), html.percent(one.top1), html.percent(one.top5),
                  str(one.members), f"{text(change.source)}; paper: {text(change.what)}"] for one in five if key == paper.FIVE]
        rows += ours or ([[text(change.what), *given, *[NONE] * 5, text(change.source)]] if change.top1 else [])
    note = "The paper’s differences are on ILSVRC, one run each."
    if full and not full.data_set:
        note += f" Ours are on {full.data}: other data and another size, so only signs and order can be compared."
    return html.table("Changes to the network", _CHANGES, rows, text(note), left=(0, 8))


def _errors(group: Group) -> list[str]:
    """Cells: top-1 and top-5 error of the test, number of seeds."""
    top1 = group.stat("test_top1")
    return [html.percent(top1), html.percent(group.stat("test_top5")), str(top1.n if top1 else 0)]
