"""Runs that differ only in the seed are one result: mean, standard deviation, number of seeds."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train.report import paper
from train.config import PATHS, SPEED
from train.report.facts import Run

COUNTED = ("test_top1", "test_top5", "validation_top1", "validation_top5", "images_per_s", "waited", "minutes")


@dataclass(frozen=True)
class Stat:
    """A mean over n runs and their standard deviation (None for one)."""

    mean: float
    sd: float | None
    n: int


def stat(values: Iterable[float | None]) -> Stat | None:
    """Of the values that are there; None when none is."""
    known = [value for value in values if value is not None]
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)) if known else None


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on the same images, sorted by seed.

    Attributes:
        name: what their names begin with.
        runs: all of them.
        experiment: which of the paper's (see paper.experiment), "" for none, and in what it departs from the full network.
        departs: the same in words.
    """

    name: str
    runs: tuple[Run, ...]
    experiment: str
    departs: str

    @property
    def config(self) -> dict[str, Any]:
        """Of its first run; the others' differ in seed, speed and paths."""
        return dict(self.runs[0].config)

    @property
    def counted(self) -> list[Run]:
        """One run a seed, the furthest: a seed twice is the same draw twice."""
        furthest: dict[int, Run] = {}
        for run in sorted(self.runs, key=lambda run: (run.test is not None, len(run.epochs)), reverse=True):
            furthest.setdefault(run.seed, run)
        return [furthest[seed] for seed in sorted(furthest)]

    @property
    def data_set(self) -> str:
        """Key of the paper's data set, "" for another (also when its runs do not agree)."""
        found = {run.data_set for run in self.runs}
        return found.pop() if len(found) == 1 else ""

    @property
    def data(self) -> str:
        """The data in words: the paper's name for it, or the index's folder; with classes and images."""
        bounds = min((run.train_images for run in self.runs if run.train_images), key=lambda two: two[1] - two[0], default=None)
        count = "" if bounds is None else f"{bounds[0]:,}" if bounds[0] == bounds[1] else f"about {sum(bounds) // 2:,}"
        known = paper.DATA_SETS[self.data_set].title if self.data_set else \
            os.path.basename(str(self.config["data"].get("index", "")).rstrip("/"))
        return f"{known} ({self.config['model'].get('classes')} classes{count and f', {count} training images'})"

    @property
    def furthest(self) -> list[Run]:
        """The counted runs that have as many epochs as any: those behind cannot be averaged with them."""
        most = max(len(run.epochs) for run in self.counted)
        return [run for run in self.counted if len(run.epochs) == most]

    def values(self, name: str) -> list[float | None]:
        """A figure of COUNTED for each of the furthest runs, None where it has none: shares, images/s, minutes."""
        return [_figure(run, name) for run in self.furthest]

    def stat(self, name: str) -> Stat | None:
        """Mean and standard deviation of a figure of COUNTED."""
        return stat(self.values(name))


def _figure(run: Run, name: str) -> float | None:
    last = run.epochs[-1] if run.epochs else None
    seconds = [(epoch, epoch.seconds) for epoch in run.epochs if epoch.seconds]
    spent = sum(second for _, second in seconds)
    if name.startswith("test"):
        return None if run.test is None else run.test.top1 if name.endswith("1") else run.test.top5
    if name.startswith("validation"):
        return None if last is None else last.top1 if name.endswith("1") else last.top5
    if not spent:
        return None
    if name == "minutes":
        return spent / 60
    pairs = [(getattr(epoch, name), second) for epoch, second in seconds if getattr(epoch, name) is not None]
    return sum(value * second for value, second in pairs) / sum(second for _, second in pairs) if pairs else None


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order in which their first runs were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_recipe(run), []).append(run)
    return _told_apart([Group(_name([run.name for run in members]), tuple(sorted(members, key=lambda run: (run.seed, run.name))),
                              *paper.experiment(members[0].config)) for members in found.values()])


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """Groups of one name get the folder in which they differ before it, or, where there is none, their seeds behind it."""
    def folders(one: Group) -> tuple[str, ...]:
        return one.runs[0].folder.resolve().parent.parts[::-1]

    found = []
    for one in groups:
        mine, others = folders(one), [folders(other) for other in groups if other is not one and other.name == one.name]
        depth = next((k for k in range(len(mine)) if all(mine[:k + 1] != other[:k + 1] for other in others)), None)
        between = "/…/" if depth else "/"
        name = f"{mine[depth]}{between}{one.name}" if depth is not None else \
            f"{one.name} (seed{'s' * (len(one.runs) > 1)} {', '.join(str(run.seed) for run in one.runs)})"
        found.append(dataclasses.replace(one, name=name) if others else one)
    return found


def _recipe(run: Run) -> str:
    """What runs of a group have in common: all that changes results (precision too) but the seed, and the images."""
    values = json.loads(json.dumps(run.config, default=str))
    values["machine"] = {"precision": (values.get("machine") or {}).get("precision", "fp32")}
    for name in SPEED:
        if name != "machine":
            values.pop(name, None)
    for part, name in PATHS:
        (values.get(part) or {}).pop(name, None)
    del values["train"]["seed"]
    return json.dumps([values, images(run), paper.fine_tuned(run.config)], sort_keys=True)


def images(run: Run) -> str:
    """What tells a run's images from others': hash of the index, or of the training images, or the index's path."""
    return str(run.start("index") or run.images_sha256 or run.config["data"].get("index"))


def by_images(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups on the same images together, and what these are in words: of those that know them exactly, if any does."""
    found: dict[str, list[Group]] = {}
    for one in groups:
        found.setdefault(images(one.runs[0]), []).append(one)
    return [(min((one.data for one in members), key=len), members) for members in found.values()]


def _name(names: Sequence[str]) -> str:
    """Of a group: that of its only run; what most names are without the seed at their end; else what they begin with."""
    if len(set(names)) == 1:
        return names[0]
    stems = collections.Counter(re.sub(r"[-_. ]+(s|seed)?[-_.=]?\d+$", "", name) for name in names)
    stem, times = stems.most_common(1)[0]
    return stem if times > 1 and stem else os.path.commonprefix(list(names)).rstrip("-_. ") or names[0]
