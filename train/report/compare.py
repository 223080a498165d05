"""Results compared: with the paper's, where they are its experiment on its data; with the full network's on the same data, as a
difference with its 95% interval (Welch's, over seeds); averages of networks with single ones; ReLU with tanh (figure 1).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from pipeline.io_errors import in_words
from train.config import differences
from train.evaluate import ensemble, predictions
from train.report import paper
from train.report.groups import Group, Stat, precision, stat
from train.report.runs import EVALUATIONS, Run, Test


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
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (one.n - 1) + parts[1] ** 2 / (other.n - 1))
    return Difference(mean, float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts)))


@dataclass(frozen=True)
class Ablation:
    """A changed network against the full one on the same images: differences of the test's errors."""

    group: Group
    full: Group
    change: paper.Change
    top1: Difference | None
    top5: Difference | None
    also: tuple[str, ...]  # other keys that differ, `key: full's -> its`; then the difference is not the change's alone


def ablations(groups: Sequence[Group]) -> list[Ablation]:
    """Every group that is a change of the paper's, against the full network that it differs least from."""
    found = []
    for one in groups:
        if change := paper.CHANGES.get(one.experiment):
            rivals = [(_also(one, full, change), full) for full in groups
                      if full.experiment == paper.FULL and full.images == one.images]
            if rivals:
                also, full = min(rivals, key=lambda rival: (len(rival[0]), -len(rival[1].counted)))
                top1, top5 = (difference(one.values(name), full.values(name)) for name in ("test_top1", "test_top5"))
                found.append(Ablation(one, full, change, top1, top5, also))
    return found


def _also(one: Group, full: Group, change: paper.Change) -> tuple[str, ...]:
    """Keys that differ without the change asking for it."""
    keys = [line for line in differences(one.config, full.config) if not line.startswith(("train.seed:", *change.touches))]
    if precision(full.config) != precision(one.config):
        keys.append(f"machine.precision: {precision(full.config)} -> {precision(one.config)}")
    return tuple(keys)


def matches(row: paper.Row, groups: Sequence[Group]) -> list[Group]:
    """The groups that are this experiment of the paper, on its data, at its size."""
    key = paper.FULL if row.key in (paper.FIVE, paper.SEVEN) else row.key
    return [one for one in groups if one.data_set == row.data and one.experiment == key and paper.paper_size(one.config, key)]


def ten_crops(run: Run, row: paper.Row) -> Test | None:
    """A run's test as the paper tests, ten crops of every image of the row's split: at the end of training, or a saved evaluation
    of the last or the best checkpoint."""
    images, saved = paper.DATA_SETS[row.data].test, _saved(run)
    return next((test for test in run.tests if test.views == 10 and images in (None, test.images)
                 and (not test.source or test in saved)), None)


def _saved(run: Run) -> list[Test]:
    """Saved evaluations of a run's last or best checkpoint."""
    manifests = {saved.manifest for saved in (*run.checkpoints[-1:], run.best) if saved}
    return [test for test in run.tests if test.source and test.checkpoint in manifests]


@dataclass(frozen=True)
class Ensemble:
    """A test of the mean of the probabilities of networks (paper §6), one a seed, with ten crops; differences are from the mean
    of its members' errors."""

    group: Group
    members: int
    images: int
    top1: float
    top5: float
    less_top1: Difference
    less_top5: Difference
    tuned: Group | None = None  # fine-tuned networks among them, and how many
    of_tuned: int = 0


def ensembles(groups: Sequence[Group]) -> tuple[list[Ensemble], list[str]]:
    """Of each group with evaluations of several runs, ten crops of the test split, and of full networks with fine-tuned ones of
    the same images; and which could not be averaged."""
    found, problems = [], []
    pairs = [(full, tuned) for full, tuned in itertools.permutations(groups, 2)
             if (full.experiment, tuned.experiment) == (paper.FULL, paper.TUNED)]
    for one, tuned in [*((one, None) for one in groups), *pairs]:
        own, others = _tested(one), _tested(tuned) if tuned else []
        members = own + others
        if len(members) < 2 or tuned and not (own and others):
            continue
        try:
            loaded = [predictions.load(run.folder / EVALUATIONS / test.source) for run, test in members]
            ensemble.check_compatible(loaded)
            score = ensemble.ensemble_result(loaded).score
        except (ValueError, RuntimeError, OSError) as error:
            if tuned is None:
                problems.append(f"{one.name}: its networks cannot be averaged ({in_words(error).partition(';')[0]})")
            continue
        less_top1, less_top5 = (Difference(whole - sum(getattr(test, name) for _, test in members) / len(members), None)
                                for name, whole in (("top1", score.top1), ("top5", score.top5)))
        found.append(Ensemble(one, len(members), score.images, score.top1, score.top5, less_top1, less_top5, tuned, len(others)))
    return found, problems


def _tested(one: Group) -> list[tuple[Run, Test]]:
    """A run a seed, with its saved evaluation of ten crops of the test split."""
    found = {run.seed: (run, test) for run in one.counted for test in _saved(run)
             if (test.views, test.split) == (10, one.config["data"].get("test_split"))}
    return list(found.values())


def averages(row: paper.Row, ensembles: Sequence[Ensemble]) -> list[Ensemble]:
    """What stands beside the paper's average of five full networks, or of these and two fine-tuned ones, on the same images."""
    counts = (5, 0) if row.key == paper.FIVE else (7, 2)
    tuned = next(other for other in paper.ROWS if other.key == paper.TUNED)
    return [one for one in ensembles if (one.members, one.of_tuned) == counts and one.images == paper.DATA_SETS[row.data].test
            and matches(row, [one.group]) and (one.tuned is None or matches(tuned, [one.tuned]))]


def relu_and_tanh(groups: Sequence[Group]) -> tuple[Group, Group] | None:
    """Figure 1: the quickest pair on CIFAR-10 that differs in nothing but the activation and the rates (§3.1 chooses them for
    each)."""
    def epochs(one: Group) -> float:
        mean = epochs_to_error(one)
        return mean.mean if mean and mean.n == len(one.counted) else math.inf

    on_cifar = [one for one in groups if one.data_set == "cifar10"]
    pairs = [(relu, tanh) for relu, tanh in itertools.permutations(sorted(on_cifar, key=epochs), 2)
             if (relu.config["model"].get("activation"), tanh.config["model"].get("activation")) == ("relu", "tanh")
             and not [line for line in differences(tanh.config, relu.config) if not line.startswith(
                 ("model.activation", "model.layers.", "optimizer.", "schedule.", "train.seed", "train.epochs"))]]
    return min(pairs, key=lambda pair: (epochs(pair[0]), epochs(pair[1])), default=None)


def epochs_to_error(one: Group, error: float = paper.TRAINING_ERROR) -> Stat | None:
    """Epochs until the training error is this low, between two epochs by a straight line, over the runs that reach it."""
    found = []
    for run in one.counted:
        before: tuple[float, float] | None = None
        for epoch in run.epochs:
            if epoch.error is None:
                continue
            if epoch.error <= error:
                found.append(float(epoch.epoch + 1) if before is None else before[0] + (epoch.epoch + 1 - before[0])
                             * (before[1] - error) / (before[1] - epoch.error))
                break
            before = epoch.epoch + 1, epoch.error
    return stat(found)
