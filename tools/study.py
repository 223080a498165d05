"""Read a study (YAML): its runs, their order, and which are tested together; all is checked before any run begins."""
import graphlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import parse_line
from train.cli import nearest
from train.config import Config
from train.recipe import RECIPES, find_recipe, parse
from train.recipe.strict_yaml import load_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_RESERVED = ("train.seed", "machine.runs", "machine.name")  # the study sets them for each run
_ADVICE = {list: "must be a list; put [ ] round it",
           dict: "must map keys of the recipe to values; write {optimizer.lr: 0.01}"}
# Keys of the file, of a run and of an ensemble → their type; the first ones are required.
_STUDY: dict[str, type] = {"runs": list, "set": dict, "ensembles": list, "argv": list}
_RUN: dict[str, type] = {"name": str, "recipe": str, "seeds": list, "grid": dict, "set": dict, "after": list}
_ENSEMBLE: dict[str, type] = {"name": str, "of": list, "views": int}


@dataclass(frozen=True)
class Run:
    """One training."""

    group: str  # name of an entry of `runs`, whose runs differ in the seed or in the point of a grid
    name: str  # of its folder
    point: str  # the values of the grid, as they stand in the name; empty without a grid
    argv: tuple[str, ...]  # of train.main
    after: tuple[str, ...]  # groups that must be done before it begins
    config: Config  # what argv means


@dataclass(frozen=True)
class Ensemble:
    """Networks whose probabilities are averaged: all runs of some groups."""

    name: str
    of: tuple[str, ...]
    members: tuple[Run, ...]  # in the study's order
    views: int


@dataclass(frozen=True)
class Study:
    """A study file, read and checked."""

    name: str
    runs: tuple[Run, ...]
    ensembles: tuple[Ensemble, ...]


def read_study(path: str | Path, runs: Path, extra: Sequence[str] = ()) -> Study:
    """Read a study. `runs`: folder of its folder; `extra`: words for every command line. Raises ValueError for any mistake in it,
    a command line that train.main would not take included."""
    path = find_recipe(path, shipped=RECIPES / "studies", what="study")
    path = path.absolute()
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"study (={path}) is no YAML: {' '.join(str(error).split())}; correct it") from None
    _need(isinstance(values, dict) and bool(values.get("runs")), "study", path, "has no runs; see alexnet study --help")
    _check(values, _STUDY, path.name)
    entries = [_entry(entry, _RUN, "run", path) for entry in values["runs"]]
    made = [run for entry in entries for run in _runs(entry, values, path, runs / path.stem, extra)]
    after = {run.group: run.after for run in made}
    ensembles = []
    for entry in values.get("ensembles") or []:
        entry = _entry(entry, _ENSEMBLE, "ensemble", path)
        name, of, views = str(entry["name"]), tuple(entry["of"]), entry.get("views", 10)
        ensembles.append(Ensemble(name, of, tuple(run for run in made if run.group in of), views))
    for kind, names in (("run", [run.name for run in made]), ("ensemble", [ensemble.name for ensemble in ensembles])):
        for name in names:
            _need(names.count(name) == 1, kind, name, f"of {path.name} is there twice; give one another name")
    for name in itertools.chain(*after.values(), *(ensemble.of for ensemble in ensembles)):
        _need(name in after, "run", name, f"is not among those of {path.name}: {', '.join(sorted(after))}; correct the name")
    for ensemble in ensembles:
        _need(ensemble.views in (1, 10), "views", ensemble.views, f"of ensemble {ensemble.name} must be 1 or 10; correct it")
        _need(len(ensemble.members) > 1, "ensemble", ensemble.name,
              "has one network only; name more runs, or give its run more seeds")
    try:
        graphlib.TopologicalSorter(after).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"after (={' → '.join(error.args[1])}) goes round in a circle; take one of them away") from None
    return Study(path.stem, tuple(made), tuple(ensembles))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics. What follows the last line's end is being written, or was cut off by a kill."""
    metrics = folder / "metrics.jsonl"
    whole = (metrics.read_bytes() if metrics.is_file() else b"").split(b"\n")[:-1]
    return [values for line in whole if line.startswith(b'{"kind": "%s"' % kind.encode()) and (values := parse_line(line))]


def test_of(folder: Path) -> dict[str, Any] | None:
    """The test line of a run's metrics; None when it is not there yet."""
    return next(reversed(lines(folder, "test")), None)


def _need(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} (={value}) {rule}")


def _check(values: dict[str, Any], types: dict[str, type], where: str) -> None:
    """Raise ValueError for values of another type, and settings that the study makes itself."""
    for key, value in values.items():
        _need(key in types, "key", key, f"of {where} is not known; it has "
              + "; ".join(filter(None, (", ".join(sorted(types)), nearest(str(key), types)))))
        if (kind := types[key]) in _ADVICE:
            _need(value is None or isinstance(value, kind), key, value, f"of {where} {_ADVICE[kind]}")
        for name in value if kind is dict and value else ():
            _need(name not in _RESERVED, key, name, f"of {where} is said by the study itself; use seeds and name")
        if key in ("argv", "after", "of"):
            _need(all(isinstance(word, str) for word in value or ()), key, value,
                  f"of {where} must be a list of words; put them in quotes")


def _entry(entry: Any, types: dict[str, type], kind: str, path: Path) -> dict[str, Any]:
    """An entry of a list, with its first two keys and no unknown one."""
    where, required = f"{kind}s of {path.name}", sorted(list(types)[:2])
    if not isinstance(entry, dict):
        raise ValueError(f"entry (={entry}) of {where} must be a mapping; write {{{', '.join(required)}, …}}")
    for key in required:
        _need(entry.get(key) not in (None, "", []), "entry", entry, f"of {where} has no {key}; add it")
    _need(bool(_NAME.fullmatch(str(entry["name"]))), "name", entry["name"],
          f"of {where} must be letters, digits and _ . + -, for a folder; correct it")
    _check(entry, types, f"{kind} {entry['name']}")
    return entry


def _in_name(value: Any) -> str:
    """A value of a grid as part of a folder's name."""
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text).strip("_")


def _runs(entry: dict[str, Any], study: dict[str, Any], path: Path, folder: Path, extra: Sequence[str]) -> Iterator[Run]:
    """A run for each seed and each point of the grid."""
    group, where = str(entry["name"]), f"run {entry['name']}"
    recipe = find_recipe(str(entry["recipe"]), path.parent.parent, blame=f", or correct {where} of {path.name}")
    seeds, grid = entry.get("seeds") or [1], entry.get("grid") or {}
    _need(all(type(seed) is int for seed in seeds), "seeds", seeds, f"of {where} must be whole numbers; correct them")
    for key, tried in grid.items():
        _need(isinstance(tried, list) and bool(tried), f"grid.{key}", tried,
              f"of {where} must be a list of values; put [ ] round it")
    for seed, values in itertools.product(seeds, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        point = "-".join(f"{key.split('.')[-1]}{_in_name(value)}" for key, value in chosen.items())
        name = f"{group}-s{seed}" + (f"-{point}" if point else "")
        settings = {**(study.get("set") or {}), **(entry.get("set") or {}), **chosen, "train.seed": seed}
        words = [f"--{key}=" + (value.replace("{seed}", str(seed)).replace("{study}", str(folder)) if isinstance(value, str)
                                else json.dumps(value)) for key, value in settings.items()]
        argv = (str(recipe), *words, *(study.get("argv") or ()), *extra, f"--machine.runs={folder}",
                f"--machine.name={name}")
        try:
            config = parse(argv).config
        except ValueError as error:
            raise ValueError(f"run (={name}) of {path.name} cannot begin: {error}") from None
        yield Run(group, name, point, argv, tuple(entry.get("after") or ()), config)
