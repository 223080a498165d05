"""Recipes (YAML files) and command lines: parsed strictly into a `Config`, and written back.

A recipe has the groups of train/config.py; `--group.key=value` overrides a value, and `extends: OTHER.yaml` (relative to the
file) inherits all that a recipe does not state. Stricter than YAML: a repeated key is an error (PyYAML takes the last), 5e-4 is a
number (PyYAML reads a string), and a value that changes results must be stated, null included.
"""
import argparse
import dataclasses
import functools
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Hashable, Sequence

import jsonargparse
import yaml

from train.config import Config

GROUPS: dict[str, type] = typing.get_type_hints(Config)
MODE = "strict_yaml"
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times faster, where it is installed


class StrictLoader(PARSER):
    """YAML loader with floats in every usual notation, and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} (line {key_node.start_mark.line + 1}) is given twice; keep one")
            seen.add(key)
        return dict(super().construct_mapping(node, deep))


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in PARSER.yaml_implicit_resolvers.items()}
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
               r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"), list("-+0123456789."))


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""
    config: Config
    resume: bool
    recipe: Path | None  # the last one named


def load_yaml(text: str) -> Any:
    """Plain values of a YAML text, read strictly. Raises ValueError or yaml.YAMLError."""
    return yaml.load(text, Loader=StrictLoader)  # noqa: S506 (a SafeLoader)


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of the one it extends: mappings are merged, all else is replaced. `children` are the
    recipes that extend this one. Raises ValueError when there is no such file, or it is no mapping, or extends itself."""
    if not path.is_file():
        raise ValueError(f"recipe (={path}) does not exist; give one of train/recipes" + (
            f", or correct extends in {children[-1]}" if children else ""))
    if path.resolve() in (other.resolve() for other in children):
        raise ValueError(f"extends (={path.name} in {children[-1]}) leads back to itself; take one of the lines away")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe (={path}) is no YAML: {_one_line(str(error))}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe (={path}) must be groups of keys, not a {type(values).__name__}; see train/recipes/demo.yaml")
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("lrn"), dict) and model["lrn"].get("across") is False:
        del model["lrn"]["across"]  # runs of version 0.1 say so; windows never cross towers now
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"extends (={parent} in {path}) must be the name of a recipe beside it; correct it")
    return dict(_merge(read_recipe(path.parent / parent, (*children, path)), values))


def _merge(base: Any, values: Any) -> Any:
    """`values` over `base`: mappings key by key, all else replaced."""
    if not isinstance(base, dict) or not isinstance(values, dict):
        return values
    return base | {key: _merge(base.get(key), value) for key, value in values.items()}


@functools.cache
def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `python -m train.main`."""
    jsonargparse.set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError, ValueError))
    parser = jsonargparse.ArgumentParser(
        prog="python -m train.main", exit_on_error=False, allow_abbrev=False, parser_mode=MODE, default_env=False,
        description="Train the two-tower AlexNet as a recipe says; exit codes: 0 done, 2 a mistake in recipe or command line, "
                    "3 the loss or a gradient was not finite, 4 the machine failed, 75 stopped and saved (resume with --resume).")
    parser.add_argument("--config", action="config", help="a recipe, train/recipes/*.yaml")
    parser.add_argument("--resume", action="store_true", help="resume from the newest good checkpoint of the run folder")
    for name, group in GROUPS.items():
        parser.add_class_arguments(group, name)
    return parser


def parse(argv: Sequence[str]) -> CommandLine:
    """Parse a command line; `--help` and `--print_config` print and exit 0. Raises ValueError for an unknown or missing key, a
    value of the wrong type or out of range."""
    if not any(word.startswith(("--config", "--help", "-h", "--print_config")) for word in argv):
        raise ValueError("--config (=none) must name a recipe; give one of train/recipes, such as --config "
                         "train/recipes/demo.yaml")
    paths, layers, words = _split(argv)
    try:
        values: dict[str, Any] = {}
        for path in paths:
            values = _merge(values, read_recipe(path))
        values = {name: group for name, group in _merge(values, layers).items() if group is not None or name not in GROUPS}
        parser = build_parser()
        parsed = parser.parse_args(["--config", yaml.safe_dump(values, sort_keys=False), *words] if paths else words)
        _check_all_stated(values, argv)
        built = parser.instantiate(parsed)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(_one_line(str(error))) from None
    config = Config(**{name: built[name] for name in GROUPS})
    _check_finite(config.as_dict())
    return CommandLine(config, bool(parsed.resume), paths[-1] if paths else None)


def _split(argv: Sequence[str]) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The recipes named on a command line; its values below model.layers, which the parser would take for strings; the other
    words."""
    paths: list[Path] = []
    layers: dict[str, Any] = {}
    words, rest = [], list(argv)
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
            nested = load_yaml(value)
        except yaml.YAMLError:
            raise ValueError(f"{name} (={value}) is no YAML; write key: value with a space, in quotes for the shell") from None
        for key in reversed(name.removeprefix("--").split(".")):
            nested = {key: nested}
        layers = _merge(layers, nested)
    return paths, layers, words


def _check_all_stated(values: dict[str, Any], argv: Sequence[str]) -> None:
    """Raise ValueError for a field without default that is not stated: the parser would take null for an Optional."""
    for name, group in GROUPS.items():
        for item in dataclasses.fields(group):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            key = f"{name}.{item.name}"
            stated = item.name in (values.get(name) or {}) or any(re.match(rf"--{re.escape(key)}[.=]?", a) for a in argv)
            if required and not stated:
                raise ValueError(f"{key} is missing; a field that changes results has no default: state it in the recipe "
                                 f"or with --{key}=VALUE")


def _check_finite(values: Any, key: str = "") -> None:
    """Raise ValueError for .nan and .inf, which pass most comparisons and would show as a loss that is not finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, (list, tuple)):
        for value in values:
            _check_finite(value, key)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{key} (={values}) must be a finite number; correct the recipe or the command line")


def _one_line(message: str) -> str:
    """A parser's message on one line, without its remarks on the null that an Optional could also be."""
    line = re.sub(r"\s+", " ", message).strip()
    line = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - (.*?) - Expected a "
                  r"<class 'NoneType'>.*", r"\1", line)
    line = re.sub(r"Problem with given class_path '\S*?(\w+)': ", r"\1: ", line)
    return line if "; " in line else f"{line}; correct the recipe or the command line (--print_config shows the whole)"


def dump(config: Config) -> str:
    """The resolved recipe as YAML; `load` gives the same config back."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False)


def load(path: Path) -> Config:
    """The config of a recipe, or of a run's config.yaml. Raises ValueError as `parse`."""
    return parse(["--config", str(path)]).config
