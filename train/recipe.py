"""Recipes and command lines into a `Config`, and back.

A recipe is YAML with the groups of train/config.py; `--group.key=value` overrides it. `extends: OTHER.yaml` (beside it) takes all
that it does not say from another recipe, so that an experiment says what is different about it, and nothing else. Read more
strictly than YAML asks: the same key twice is an error (PyYAML takes the last), 5e-4 is a number (PyYAML reads a string), and a
field that changes results must be said, null included.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Hashable, Sequence

import jsonargparse
import yaml

from model.config import ModelConfig
from train.config import Config, Data, InitConfig, MachineConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig

GROUPS: dict[str, type] = {"data": Data, "model": ModelConfig, "optimizer": OptimizerConfig,
                           "schedule": ScheduleConfig, "train": TrainConfig, "machine": MachineConfig,
                           "parallel": ParallelConfig, "init_from": InitConfig}
MODE = "strict_yaml"


class StrictLoader(yaml.SafeLoader):
    """YAML with floats as people write them, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} (line {key_node.start_mark.line + 1}) is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
               r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"), list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """Plain values of a YAML text, read strictly.

    Raises:
        ValueError: a key given twice.
    """
    return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe, with those of the one it extends beneath them. Mappings are merged, all else is replaced.

    Args:
        above: the recipes that led to this one.

    Raises:
        ValueError: no such file, not YAML, no mapping, or it extends itself.
    """
    if not path.is_file():
        raise ValueError(f"recipe (={path}) does not exist; give one of train/recipes" + (
            f", or correct extends in {above[-1]}" if above else ""))
    if path.resolve() in (other.resolve() for other in above):
        raise ValueError(f"extends (={path.name} in {above[-1]}) leads back to itself; take one of the lines away")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe (={path}) is no YAML: {_tidy(str(error))}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe (={path}) must be groups of keys, not a {type(values).__name__}; see train/recipes/demo.yaml")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"extends (={parent} in {path}) must be the name of a recipe beside it; correct it")
    return _merged(read_recipe(path.parent / parent, (*above, path)), values)


def _merged(below: Any, values: Any) -> Any:
    """`values` over those `below`."""
    if not isinstance(below, dict) or not isinstance(values, dict):
        return values
    return below | {key: _merged(below.get(key), value) for key, value in values.items()}


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: Config
    resume: bool
    recipe: Path | None


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `python -m train.main`."""
    jsonargparse.set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError, ValueError))
    parser = jsonargparse.ArgumentParser(
        prog="python -m train.main", exit_on_error=False, allow_abbrev=False, parser_mode=MODE, default_env=False,
        description="Train the two-tower AlexNet as a recipe says; exit codes: 0 done, 2 a mistake in what was asked, "
                    "3 the loss or a gradient was not finite, 4 the machine failed, 75 stopped and saved (go on with --resume).")
    parser.add_argument("--config", action="config", help="a recipe, train/recipes/*.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last good checkpoint of the run folder")
    for name, group in GROUPS.items():
        parser.add_class_arguments(group, name)
    return parser


def _say_all(raw: dict[str, Any], argv: Sequence[str]) -> None:
    """Every field that changes results is said, in the recipe or here; the parser would make an Optional null."""
    for name, group in GROUPS.items():
        for item in dataclasses.fields(group):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            key = f"{name}.{item.name}"
            said = item.name in (raw.get(name) or {}) or any(re.match(rf"--{re.escape(key)}[.=]?", a) for a in argv)
            if required and not said:
                raise ValueError(f"{key} is missing; a field that changes results has no default: say it in the recipe "
                                 f"or with --{key}=VALUE")


def parse(argv: Sequence[str]) -> Request:
    """Command line to request. `--help` and `--print_config` print and exit 0.

    Raises:
        ValueError: an unknown or missing key, a value of the wrong type or outside its range.
    """
    parser = build_parser()
    paths, layers, words = _recipes(argv)
    if not any(word.startswith(("--config", "--help", "-h", "--print_config")) for word in argv):
        raise ValueError("--config (=none) must name a recipe; give one of train/recipes, such as --config "
                         "train/recipes/demo.yaml")
    try:
        raw: dict[str, Any] = {}
        for path in paths:
            raw = _merged(raw, read_recipe(path))
        raw = {name: values for name, values in _merged(raw, layers).items() if values is not None or name not in GROUPS}
        space = parser.parse_args([*words[:1], yaml.safe_dump(raw, sort_keys=False), *words[1:]] if paths else words)
        _say_all(raw, argv)
        made = parser.instantiate(space)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(_tidy(str(error))) from None
    config = Config(**{name: made[name] for name in GROUPS})
    _all_finite(config.as_dict())
    return Request(config, bool(space.resume), paths[-1] if paths else None)


def _recipes(argv: Sequence[str]) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The recipes named on a command line; what it says of single layers, which the parser would take for strings; and the other
    words, with a --config in front that awaits the recipes' values, if there is any."""
    paths: list[Path] = []
    said: dict[str, Any] = {}
    words, rest = ["--config"], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--config", "--model.layers") and not name.startswith("--model.layers."):
            words.append(word)
            continue
        if not equals:
            if not rest:
                raise ValueError(f"{name} (=none) must have a value; write {name}=VALUE")
            value = rest.pop(0)
        if name == "--config":
            paths.append(Path(value))
            continue
        try:
            found = load_yaml(value)
        except yaml.YAMLError:
            raise ValueError(f"{name} (={value}) is no YAML; write key: value with a space, in quotes for the shell") from None
        for key in reversed(name.removeprefix("--").split(".")):
            found = {key: found}
        said = _merged(said, found)
    return paths, said, words if paths else words[1:]


def _all_finite(values: Any, key: str = "") -> None:
    """Refuse .nan and .inf, which pass most comparisons and come out as a loss that is not finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            _all_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, (list, tuple)):
        for value in values:
            _all_finite(value, key)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{key} (={values}) must be a finite number; correct the recipe or the command line")


def _tidy(message: str) -> str:
    """A message of the parser on one line, without its remarks on the null that an Optional could also have been."""
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*?) - Expected a "
                  r"<class 'NoneType'>.*", r"\1", line)
    line = re.sub(r"Problem with given class_path '\S*?(\w+)': ", r"\1: ", line)
    return line if "; " in line else f"{line}; correct the recipe or the command line (--print_config shows the whole)"


def dump(config: Config) -> str:
    """The resolved recipe as YAML; `load` gives the same config back."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def load(path: Path) -> Config:
    """The config in a YAML file that says everything, such as a run's config.yaml.

    Raises:
        ValueError: as `parse`.
    """
    return parse(["--config", str(path)]).config
