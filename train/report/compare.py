"""Results held against others: against the paper's, where they are its experiment on its data; against the full network's on the
same data, as a difference with its 95% interval (Welch's, over seeds); and averages of networks against single ones.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.report import paper
from train.config import differences
from train.report.facts import Run, Test
from train.report.groups import Group, Stat, images, stat
from train.report.runs import EVALUATIONS


@dataclass(frozen=True)
class Difference:
    """Mean of one group less that of another, and half the width of its 95% interval (None where either has one run)."""

    mean: float
    half: float | None


def difference(ours: Sequence[float | None], full: Sequence[float | None]) -> Difference | None:
    """Welch's: variances may differ. None when either has no value."""
    one, other = stat(ours), stat(full)
    if one is None or other is None:
        return None
    mean = one.mean - other.mean
    if one.sd is None or other.sd is None:
        return Difference(mean, None)
    parts = one.sd ** 2 / one.n, other.sd ** 2 / other.n
    if not sum(parts):
        return Difference(mean, 0.0)
    from scipy.special import stdtrit

    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (one.n - 1) + parts[1] ** 2 / (other.n - 1))
    return Difference(mean, float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts)))


@dataclass(frozen=True)
class Ablation:
    """A changed network against the full one on the same images.

    Attributes:
        group, full: both results.
        change: what the paper says of the change.
        top1, top5: differences of the test's errors, shares.
        also: other keys in which the recipes differ, `key: full's -> its`; then the difference is not the change's alone.
    """

    group: Group
    full: Group
    change: paper.Change
    top1: Difference | None
    top5: Difference | None
    also: tuple[str, ...]


def ablations(groups: Sequence[Group]) -> list[Ablation]:
    """Every group that is a change of the paper's, against the full network that it differs least from."""
    found = []
    for one in groups:
        change = paper.CHANGES.get(one.experiment)
        rivals = [(_also(one, full, change), full) for full in groups
                  if full.experiment == paper.FULL and images(full.runs[0]) == images(one.runs[0])] if change else []
        if change and rivals:
            also, full = min(rivals, key=lambda rival: (len(rival[0]), -len(rival[1].counted)))
            top1, top5 = (difference(one.values(name), full.values(name)) for name in ("test_top1", "test_top5"))
            found.append(Ablation(one, full, change, top1, top5, also))
    return found


def _also(one: Group, full: Group, change: paper.Change) -> tuple[str, ...]:
    """Keys that differ without the change asking for it."""
    precision = [str(group.config.get("machine", {}).get("precision", "fp32")) for group in (full, one)]
    return tuple(line for line in differences(one.config, full.config)
                 if not line.startswith(("train.seed:", *change.touches))) \
        + ((f"machine.precision: {precision[0]} -> {precision[1]}",) if precision[0] != precision[1] else ())


def matches(row: paper.Row, groups: Sequence[Group]) -> list[Group]:
    """The groups that are this experiment of the paper, on its data, at its size."""
    key = paper.FULL if row.key == paper.FIVE else row.key
    return [one for one in groups
            if key and one.data_set == row.data and one.experiment == key and paper.paper_size(one.config, key)]


def ten_crops(run: Run, row: paper.Row) -> Test | None:
    """A run's test as the paper tests: ten views of every image of the row's split; None when there is none.

    The one at the end of training, or a saved evaluation of the last or the best checkpoint.
    """
    wanted = paper.DATA_SETS[row.data].test
    return next((test for test in run.tests if test.views == 10 and wanted in (None, test.images)
                 and (not test.source or test in _saved(run))), None)


def _saved(run: Run) -> list[Test]:
    """Saved evaluations of a run's last or best checkpoint."""
    told = {point.manifest for point in (*run.checkpoints[-1:], run.best) if point}
    return [test for test in run.tests if test.source and test.checkpoint in told]


@dataclass(frozen=True)
class Ensemble:
    """The mean of the probabilities of a group's networks (paper §6), one a seed.

    Attributes:
        group: whose.
        members: how many.
        split, images, views: on what they were tested, and how.
        top1, top5: its errors, shares, of one average.
        less_top1, less_top5: how far they lie from the mean of its members' errors.
    """

    group: Group
    members: int
    split: str
    images: int
    views: int
    top1: Stat
    top5: Stat
    less_top1: Difference
    less_top5: Difference


def ensembles(groups: Sequence[Group]) -> tuple[list[Ensemble], list[str]]:
    """Of each group with saved evaluations of several runs; and which could not be averaged."""
    found, problems = [], []
    for one in groups:
        saved = [(run, {(test.views, test.split): test for test in _saved(run)}) for run in one.counted]
        ways = collections.Counter(way for _, tests in saved for way in tests)
        way, count = max(ways.items(), key=lambda item: (item[1], item[0]), default=((0, ""), 0))
        if count < 2:
            continue
        members = [(run, tests[way]) for run, tests in saved if way in tests]
        from train.evaluate.ensemble import check_compatible, ensemble_result
        from train.evaluate.predictions import load

        try:
            loaded = [load(run.folder / EVALUATIONS / test.source) for run, test in members]
            check_compatible(loaded)
            score = ensemble_result(loaded).score
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"{one.name}: its networks cannot be averaged ({str(error).partition(';')[0]})")
            continue
        less = [Difference(whole - sum(getattr(test, name) for _, test in members) / len(members), None)
                for name, whole in (("top1", score.top1), ("top5", score.top5))]
        found.append(Ensemble(one, len(members), way[1], score.images, way[0], Stat(score.top1, None, 1),
                              Stat(score.top5, None, 1), less[0], less[1]))
    return found, problems


@dataclass(frozen=True)
class Sooner:
    """Figure 1: epochs until the training error falls to paper.TRAINING_ERROR, with ReLU and with tanh, over the runs that reach
    it; None: none does."""

    relu: Group
    tanh: Group
    relu_epochs: Stat | None
    tanh_epochs: Stat | None


def sooner(groups: Sequence[Group]) -> Sooner | None:
    """The quickest pair on CIFAR-10 that differs in nothing but the activation and the rates (§3.1 chooses them for each)."""
    def epochs(one: Group) -> float:
        found = stat(reached(run) for run in one.counted)
        return found.mean if found and found.n == len(one.counted) else math.inf

    on_cifar = [one for one in groups if one.data_set == "cifar10"]
    pairs = [(relu, tanh) for relu, tanh in itertools.permutations(sorted(on_cifar, key=epochs), 2)
             if (relu.config["model"].get("activation"), tanh.config["model"].get("activation")) == ("relu", "tanh")
             and not [line for line in differences(tanh.config, relu.config) if not line.startswith(
                 ("model.activation", "model.layers.", "optimizer.", "schedule.", "train.seed", "train.epochs"))]]
    if not pairs:
        return None
    relu, tanh = min(pairs, key=lambda pair: (epochs(pair[0]), epochs(pair[1])))
    return Sooner(relu, tanh, *(stat(reached(run) for run in one.counted) for one in (relu, tanh)))


def reached(run: Run, error: float = paper.TRAINING_ERROR) -> float | None:
    """Epochs until the training error is this low, between two epochs by a straight line; None when it never is."""
    before: tuple[float, float] | None = None
    for epoch in run.epochs:
        if epoch.error is None:
            continue
        if epoch.error <= error:
            if before is None or before[1] <= epoch.error:
                return float(epoch.epoch + 1)
            return before[0] + (epoch.epoch + 1 - before[0]) * (before[1] - error) / (before[1] - epoch.error)
        before = epoch.epoch + 1, epoch.error
    return None
