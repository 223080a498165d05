"""Results: runs that differ only in the seed are one, with mean, standard deviation and number of seeds."""

import collections
import dataclasses
import json
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.config import PATHS, SPEED
from train.evaluate.metrics import FEW_CLASSES
from train.report import paper
from train.report.runs import Run


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
    """Runs of one recipe on the same images, sorted by seed: one result."""

    name: str  # what their names begin with
    runs: tuple[Run, ...]
    experiment: str  # which of the paper's (see paper.experiment), "" for none
    departs: str  # in what it departs from the full network, in words
    sizes: str = ""  # and from the paper's sizes and initial values

    @property
    def config(self) -> dict[str, Any]:
        """Of its first run; the others' differ in seed, speed and paths."""
        return dict(self.runs[0].config)

    @property
    def images(self) -> str:
        """Identity of its images: hash of the index, or of the training images, or the index's path."""
        return _images(self.runs[0])

    @property
    def counted(self) -> list[Run]:
        """One run a seed, the furthest: a seed twice is the same experiment twice."""
        furthest: dict[int, Run] = {}
        for run in sorted(self.runs, key=lambda run: (run.test is not None, len(run.epochs)), reverse=True):
            furthest.setdefault(run.seed, run)
        return [furthest[seed] for seed in sorted(furthest)]

    @property
    def furthest(self) -> list[Run]:
        """The counted runs that have as many epochs as any: those behind cannot be averaged with them."""
        most = max(len(run.epochs) for run in self.counted)
        return [run for run in self.counted if len(run.epochs) == most]

    @property
    def data_set(self) -> str:
        """Key of the paper's data set, "" for another (also when its runs do not agree)."""
        keys = {run.data_set for run in self.runs}
        return keys.pop() if len(keys) == 1 else ""

    @property
    def data(self) -> str:
        """The data in words: the paper's name for it, or the index's folder; with classes and images."""
        bounds = min((run.train_images for run in self.runs if run.train_images), key=lambda two: two[1] - two[0], default=None)
        count = "" if bounds is None else f"{bounds[0]:,}" if bounds[0] == bounds[1] else f"about {sum(bounds) // 2:,}"
        name = paper.DATA_SETS[self.data_set].title if self.data_set else \
            index_name(str(self.config["data"].get("index", "")))
        return f"{name} ({self.config['model'].get('classes')} classes{count and f', {count} training images'})"

    @property
    def from_paper(self) -> str:
        """All in which its network is not the paper's, in words; "" for nothing."""
        return "; ".join(filter(None, (self.departs * (self.experiment != paper.FULL), self.sizes)))

    @property
    def shows_top5(self) -> bool:
        """Whether there are classes enough for the error of the five best to say something."""
        return int(self.config["model"].get("classes") or 0) >= FEW_CLASSES

    def values(self, name: str) -> list[float | None]:
        """test_top1, test_top5, validation_top1, …, images_per_s, waited (shares) or minutes of each of the furthest runs."""
        return [_figure(run, name) for run in self.furthest]

    def stat(self, name: str) -> Stat | None:
        """Mean and standard deviation of `values`."""
        return stat(self.values(name))


def _figure(run: Run, name: str) -> float | None:
    what, _, top = name.partition("_")
    if what in ("test", "validation"):
        source = run.test if what == "test" else run.epochs[-1] if run.epochs else None
        return None if source is None else getattr(source, top)
    if name == "minutes":
        return sum(epoch.seconds or 0.0 for epoch in run.epochs) / 60 or None
    known = [(value, epoch.seconds) for epoch in run.epochs if epoch.seconds and (value := getattr(epoch, name)) is not None]
    return sum(value * seconds for value, seconds in known) / sum(seconds for _, seconds in known) if known else None


def group(runs: Sequence[Run]) -> list[Group]:
    """Results in the order in which their first runs were given."""
    recipes: dict[str, list[Run]] = {}
    for run in runs:
        recipes.setdefault(_recipe(run), []).append(run)
    found = []
    for members in recipes.values():
        key, departs = paper.experiment(members[0].config)
        found.append(Group(_name([run.name for run in members]), tuple(sorted(members, key=lambda run: (run.seed, run.name))),
                           key, departs, paper.other_sizes(members[0].config, key)))

    def distinct(one: Group) -> Group:
        folders = [other.runs[0].folder.resolve() for other in found if other.name == one.name]
        return one if len(folders) == 1 else dataclasses.replace(
            one, name=os.path.relpath(one.runs[0].folder.resolve(), os.path.commonpath(folders)))

    return [distinct(one) for one in found]


def _recipe(run: Run) -> str:
    """What runs of a group have in common: all that changes results but the seed, and the images."""
    return json.dumps([results_config(run), _images(run), paper.fine_tuned(run.config)], sort_keys=True)


def results_config(run: Run) -> dict[str, Any]:
    """The values of its config that change results (precision too), without the seed."""
    values: dict[str, Any] = json.loads(json.dumps(run.config, default=str))
    for name in SPEED:
        values.pop(name, None)
    for part, name in PATHS:
        (values.get(part) or {}).pop(name, None)
    del values["train"]["seed"]
    return values | {"machine": {"precision": precision(run.config)}}


def changed_values(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Keys in which the configs of groups differ, and the value of each group; "" where one has no such key."""
    flat = [dict(_flat(results_config(one.runs[0]))) for one in groups]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = {key: [values.get(key, "") for values in flat] for key in keys}
    return {key: values for key, values in rows.items()  # null beside a mapping: its keys say so
            if len(set(values)) > 1 and not any(other.startswith(f"{key}.") for other in keys)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value).replace('"', "")


def precision(config: Mapping[str, Any]) -> str:
    """Of a recipe (plain values): fp32, bf16 …"""
    return str((config.get("machine") or {}).get("precision", "fp32"))


def index_name(path: str) -> str:
    """Name of an index's folder; of one that was divided to validate on a part of it (see train.build), the whole's."""
    folder, name = os.path.split(path.rstrip("/"))
    return f"{os.path.basename(folder)} (held out)" if folder and re.fullmatch("hold-out(-[0-9a-f]{8})?", name) else name


def _images(run: Run) -> str:
    return str(run.start("index") or run.images_sha256 or run.config["data"].get("index"))


def _name(names: Sequence[str]) -> str:
    """Of a group: that of its only run; what most names are without the seed at their end; else what they begin with."""
    if len(set(names)) == 1:
        return names[0]
    stems = collections.Counter(re.sub(r"[-_. ]+(s|seed)?[-_.=]?\d+$", "", name) for name in names)
    stem, times = stems.most_common(1)[0]
    return stem if times > 1 and stem else os.path.commonprefix(list(names)).rstrip("-_. ") or names[0]


def by_images(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups on the same images together, and their data in words, of those that know it exactly, if any does; with its hash
    where the same words stand for other images, as those of a packed copy."""
    found: dict[str, list[Group]] = {}
    for one in groups:
        found.setdefault(one.images, []).append(one)
    words = {images: min((one.data for one in members), key=len) for images, members in found.items()}
    return [(f"{data}, {images[:8]}" if list(words.values()).count(data) > 1 else data, found[images])
            for images, data in words.items()]
