"""A study: which runs it is made of, in which order, and which of them are tested together. Read and checked before any begins.

The file is described in tools/run_study.py.
"""
from __future__ import annotations

import graphlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from train.config import Config
from train.recipe import load_yaml, parse

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_OURS = ("train.seed", "machine.runs", "machine.name")  # the study says them of each run


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        group: runs of one name, which differ in the seed or in the point of a grid.
        name: of its folder.
        point: the values of the grid, as they stand in the name; empty without a grid.
        argv: its command line.
        after: groups that must be done before it begins.
        config: what the command line means.
    """

    group: str
    name: str
    point: str
    argv: tuple[str, ...]
    after: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Ensemble:
    """Networks whose probabilities are averaged: all runs of some groups."""

    name: str
    of: tuple[str, ...]
    views: int


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    runs: tuple[Run, ...]
    ensembles: tuple[Ensemble, ...] = ()

    def members(self, ensemble: Ensemble) -> list[Run]:
        """The runs of an ensemble, in the study's order."""
        return [run for run in self.runs if run.group in ensemble.of]


def read_study(path: Path, runs: Path, extra: Sequence[str] = ()) -> Study:
    """Read a study. `runs`: folder of its folder; `extra`: words for every command line.

    Raises:
        ValueError: no such file, no YAML, a key that is missing, unknown or of another type, a recipe that is not there, a
            command line that train.main would not take, a name given twice, runs that wait for each other.
    """
    if not path.is_file():
        raise ValueError(f"study (={path}) does not exist; give one of train/recipes/studies")
    path = path.absolute()
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"study (={path}) is no YAML: {' '.join(str(error).split())}; correct it") from None
    _need(isinstance(values, dict) and bool(values.get("runs")), "study", path, "has no runs; see tools/run_study.py --help")
    _only(values, {"runs", "set", "ensembles", "argv"}, path.name)
    where = f"runs of {path.name}"
    made = [run for entry in _list(values, "runs", path.name) for run in _runs(_entry(entry, where, {"name", "recipe"}, {
        "seeds", "grid", "set", "after"}), values, path, runs / path.stem, extra)]
    _once([run.name for run in made], "run", path.name)
    groups = {run.group for run in made}
    ensembles = [_ensemble(_entry(entry, f"ensembles of {path.name}", {"name", "of"}, {"views"}), made)
                 for entry in _list(values, "ensembles", path.name)]
    _once([ensemble.name for ensemble in ensembles], "ensemble", path.name)
    for name in itertools.chain(*(run.after for run in made), *(ensemble.of for ensemble in ensembles)):
        _need(name in groups, "run", name, f"is not among those of {path.name}: {', '.join(sorted(groups))}; correct the name")
    for ensemble in ensembles:
        _need(len([run for run in made if run.group in ensemble.of]) > 1, "ensemble", ensemble.name,
              "has one network only; name more runs, or give its run more seeds")
    try:
        graphlib.TopologicalSorter({group: {name for run in made if run.group == group for name in run.after}
                                    for group in groups}).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"after (={' → '.join(error.args[1])}) goes round in a circle; take one of them away") from None
    return Study(path.stem, tuple(made), tuple(ensembles))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics. What is behind the last line's end is being written, or was cut off by a kill."""
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines() if line.startswith(f'{{"kind": "{kind}"')]


def test_of(folder: Path) -> Optional[dict[str, Any]]:
    """The test line of a run's metrics; None when it is not there yet."""
    found = lines(folder, "test")
    return found[-1] if found else None


def _need(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise `<key> (=value) <rule>` unless ok."""
    if not ok:
        raise ValueError(f"{key} (={value}) {rule}")


def _only(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        _need(key in known, "key", key, f"of {where} is not known; it has {', '.join(sorted(known))}")


def _entry(entry: Any, where: str, required: set[str], optional: set[str]) -> dict[str, Any]:
    """An entry of a list, with all of its required keys and no unknown one."""
    if not isinstance(entry, dict):
        raise ValueError(f"entry (={entry}) of {where} must be a mapping; write {{{', '.join(sorted(required))}, …}}")
    _only(entry, required | optional, where)
    for key in sorted(required):
        _need(entry.get(key) not in (None, "", []), "entry", entry, f"of {where} has no {key}; say it")
    _need(bool(_NAME.fullmatch(str(entry["name"]))), "name", entry["name"],
          f"of {where} must be letters, digits and _ . + -, for a folder; correct it")
    return entry


def _list(values: dict[str, Any], key: str, where: str) -> list[Any]:
    found = values.get(key)
    _need(found is None or isinstance(found, list), key, found, f"of {where} must be a list; put [ ] round it")
    return found or []


def _words(values: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = _list(values, key, where)
    _need(all(isinstance(word, str) for word in found), key, found, f"of {where} must be a list of words; put them in quotes")
    return tuple(found)


def _settings(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A mapping from keys of a recipe."""
    found = values.get(key)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{key} (={found}) of {where} must map keys of the recipe to values; write {{optimizer.lr: 0.01}}")
    for name in found or {}:
        _need(name not in _OURS, key, name, f"of {where} is said by the study itself; use seeds and name")
    return found or {}


def _once(names: Sequence[str], what: str, where: str) -> None:
    for name in names:
        _need(names.count(name) == 1, what, name, f"of {where} is there twice; give one another name")


def _ensemble(entry: dict[str, Any], made: Sequence[Run]) -> Ensemble:
    where = f"ensemble {entry['name']}"
    views = entry.get("views", 10)
    _need(views in (1, 10), "views", views, f"of {where} must be 1 or 10; correct it")
    return Ensemble(str(entry["name"]), _words(entry, "of", where), views)


def _runs(entry: dict[str, Any], study: dict[str, Any], path: Path, folder: Path, extra: Sequence[str]) -> Iterator[Run]:
    """A run for each seed and each point of the grid."""
    group, where = str(entry["name"]), f"run {entry['name']}"
    recipe = path.parent.parent / str(entry["recipe"])
    _need(recipe.is_file(), "recipe", recipe, f"of {where} does not exist; name a file of {recipe.parent}")
    seeds = _list(entry, "seeds", where) or [1]
    _need(all(type(seed) is int for seed in seeds), "seeds", seeds, f"of {where} must be whole numbers; correct them")
    grid = _settings(entry, "grid", where)
    for key, tried in grid.items():
        ok = isinstance(tried, list) and bool(tried)
        _need(ok, f"grid.{key}", tried, f"of {where} must be a list of values; put [ ] round it")
    said = {**_settings(study, "set", path.name), **_settings(entry, "set", where)}
    for seed, values in itertools.product(seeds, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        point = "-".join(f"{key.split('.')[-1]}{_short(value)}" for key, value in chosen.items())
        name = f"{group}-s{seed}" + (f"-{point}" if point else "")
        settings = {**said, **chosen, "train.seed": seed}
        words = ("--config", str(recipe), *(f"--{key}={_word(value, seed, folder)}" for key, value in settings.items()),
                 *_words(study, "argv", path.name), *extra, f"--machine.runs={folder}", f"--machine.name={name}")
        try:
            config = parse(words).config
        except ValueError as error:
            raise ValueError(f"run (={name}) of {path.name} cannot begin: {error}") from None
        yield Run(group, name, point, words, _words(entry, "after", where), config)


def _short(value: Any) -> str:
    """A value of a grid as part of a folder's name; 0.001 for 1e-3."""
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        text = f"{value:g}"
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_")


def _word(value: Any, seed: int, folder: Path) -> str:
    """A value as it stands on a command line. In a text, {seed} and {study} are the run's seed and the study's folder."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed)).replace("{study}", str(folder))
    return json.dumps(value)
