"""Recipes (YAML files) and command lines: parsed strictly into a `Config`, and written back.

A recipe has the groups of train/config.py; `--group.key=value` overrides a value, and `extends: OTHER.yaml` (relative to the
file) inherits all that a recipe does not state. A value that changes results must be stated, null included, and a key that
nothing reads is an error.
"""
import argparse
import dataclasses
import functools
import math
import re
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import jsonargparse
import yaml

from model.config import LAYER_NAME, Conv, Full
from pipeline.index.header import read_header
from pipeline.config import STATED
from train.config import Config
from train.recipe.strict_yaml import MOST_BYTES, Dumper, load_yaml, nearest, read_yaml

GROUPS: dict[str, type] = typing.get_type_hints(Config)
MODE = "strict_yaml"
AUTO = "auto"  # as model.classes: the number of classes of the index
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in quotes"}


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""
    config: Config
    resume: bool
    recipe: Path | None  # the last one named


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of the one it extends: mappings are merged, all else is replaced. `children` are the
    recipes that extend this one. Raises ValueError when there is no such file, or it is no mapping, has an unknown key, or
    extends itself."""
    if not path.is_file():
        raise ValueError(f"recipe (={path}) {'is no file' if path.exists() else 'does not exist'}; give one of train/recipes" + (
            f", or correct extends in {children[-1]}" if children else ""))
    if path.resolve() in (other.resolve() for other in children):
        raise ValueError(f"extends (={path.name} in {children[-1]}) leads back to itself; take one of the lines away")
    try:
        with path.open(encoding="utf-8") as file:
            values, lines = read_yaml(file.read(MOST_BYTES + 1))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe (={path}) is no YAML: {_one_line(str(error))}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe (={path}) must be groups of keys, not a {type(values).__name__}; see train/recipes/demo.yaml")
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("lrn"), dict) and model["lrn"].get("across") is False:
        del model["lrn"]["across"]  # runs of version 0.1 say so; windows never cross towers now
    parent = values.pop("extends", None)
    _check(values, Config, (), lambda keys: f" in {path}" + (f", line {lines[keys]}" if keys in lines else ""))
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"extends (={parent} in {path}) must be the name of a recipe beside it; correct it")
    return dict(_merge(read_recipe(path.parent / parent, (*children, path)), values))


def _known(kind: Any) -> dict[str, Any] | None:
    """Key → type of the values of a configuration class, or of one within Optional; None of another type."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return next(filter(None, map(_known, typing.get_args(kind))), None) if type(None) in typing.get_args(kind) else None


@functools.cache
def _all_keys() -> list[str]:
    """Every key of a recipe with its groups."""
    def below(prefix: str, kind: Any) -> list[str]:
        kind = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
        return [key for name, inner in (_known(kind) or {}).items()
                for key in (f"{prefix}{name}", *below(f"{prefix}{name}.", inner))]
    return below("", Config)


def _check(value: Any, kind: Any, keys: tuple[str, ...], place: Callable[[tuple[str, ...]], str]) -> None:
    """Raise ValueError for a key that no configuration has, or a value of another type. `place`: where keys stand."""
    def need(ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{'.'.join(keys)} (={textwrap.shorten(str(value), 60)}{place(keys)}) {rule}")

    if keys[:2] == ("model", "layers") and len(keys) > 2:  # ModelConfig checks their values
        need(bool(LAYER_NAME.fullmatch(keys[2])), "must have names conv1 … conv99 and fc1 … fc99; rename it")
        kind = dict.fromkeys(field.name for field in dataclasses.fields(Conv if keys[2].startswith("conv") else Full))
        if len(keys) == 3:
            need(isinstance(value, (dict, type(None))), f"must say what the layer is; write {{{', '.join(kind)}}}")
        known = kind if len(keys) == 3 and isinstance(value, dict) else None
        if known is None:
            return
    elif keys == ("model", "layers"):
        need(isinstance(value, dict), "must map names to layers; write conv1: {kernels: 96, px: 11, …}")
        known = dict.fromkeys(map(str, value))
    elif (known := _known(kind)) is not None:
        need(isinstance(value, (dict, type(None))), "must be a group of keys; write {key: value, …}")
    if known is not None:
        for key, inner in (value or {}).items():
            inside = *keys, str(key)
            if key not in known:
                name, all_keys = ".".join(inside), _all_keys() if len(keys) < 3 else [".".join((*keys, other)) for other in known]
                raise ValueError(f"{name} (={textwrap.shorten(str(inner), 60)}{place(inside)}) is no key that is known; "
                                 + (nearest(name, all_keys) or "take it out"))
            _check(inner, known[key], inside, place)
    elif typing.get_origin(kind) is tuple:
        need(isinstance(value, list), "must be a list; put [ ] round it")
        for inner in value:
            _check(inner, typing.get_args(kind)[0], keys, place)
    elif typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        need(value in allowed and type(value) in map(type, allowed), f"must be one of {', '.join(map(str, allowed))}; correct it")
    elif typing.get_origin(kind) is types.UnionType:  # a text or a list
        need(isinstance(value, (str, list)), "must be a text, or a list; correct it")
        if isinstance(value, list):
            _check(value, next(inner for inner in typing.get_args(kind) if inner is not str), keys, place)
    elif keys == ("model", "classes") and value == AUTO:
        pass  # see _with_classes
    elif kind in (int, float, bool, str):
        need(type(value) in ((int, float) if kind is float else (kind,)), f"must be {_NAMES[kind]}; correct it")
        need(kind is not int or abs(value) < 1 << 63, "must have at most 18 digits; correct it")
    elif kind is not Any:
        need(isinstance(value, dict), "must map names to values; write {name: value, …}")


def _merge(base: Any, values: Any) -> Any:
    """`values` over `base`: mappings key by key, all else replaced."""
    if not isinstance(base, dict) or not isinstance(values, dict):
        return values
    return base | {key: _merge(base.get(key), value) for key, value in values.items()}


@functools.cache
def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `python -m train.main`."""
    jsonargparse.set_loader(MODE, load_yaml, exceptions=(ValueError,))
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
    paths, settings, words = _split(argv)
    try:
        values: dict[str, Any] = {}
        for path in paths:
            values = _merge(values, read_recipe(path))
        values = {name: group for name, group in _merge(values, settings).items() if group is not None or name not in GROUPS}
        _check_finite(values)
        if paths:
            _check_all_stated(values)
            values = _with_classes(values)
        parser = build_parser()
        parsed = parser.parse_args(["--config", _text(values), *words] if paths else words)
        built = parser.instantiate(parsed)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(_one_line(str(error))) from None
    config = Config(**{name: built[name] for name in GROUPS})
    return CommandLine(config, bool(parsed.resume), paths[-1] if paths else None)


def _split(argv: Sequence[str]) -> tuple[list[Path], dict[str, Any], list[str]]:
    """The recipes named on a command line; the values that it sets; the other words."""
    paths: list[Path] = []
    settings: dict[str, Any] = {}
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--")
        if not word.startswith("--") or key in ("resume", "help", "print_config"):
            words.append(word)
            continue
        if key != "config" and key not in _all_keys() and not key.startswith("model.layers."):
            near = nearest(key, [*_all_keys(), "config", "resume", "help", "print_config"])
            raise ValueError(f"{name} (={value if equals else 'none'}) is no option; "
                             + (near.replace("did you mean ", "did you mean --") or "see --help"))
        if not equals:
            if not rest:
                raise ValueError(f"{name} (=none) must have a value; write {name}=VALUE")
            value = rest.pop(0)
        if key == "config":
            paths.append(Path(value))
            continue
        settings = _merge(settings, _setting(key, value))
    return paths, settings, words


def _setting(key: str, text: str) -> dict[str, Any]:
    """The nested values that `--key=text` sets, checked."""
    keys, kind, nested = key.split("."), typing.cast(Any, Config), typing.cast(Any, None)
    for name in keys:
        kind = (_known(kind) or {}).get(name, Any)
    try:
        nested = text if kind is str or typing.get_origin(kind) is typing.Literal and str in map(type, typing.get_args(kind)) \
            else load_yaml(text)
    except ValueError as error:
        raise ValueError(f"--{key} (={text}) is no YAML ({error}); write key: value with a space, in quotes for the "
                         "shell") from None
    for name in reversed(keys):
        nested = {name: nested}
    _check(nested, Config, (), lambda keys: " on the command line")
    return dict(nested)


def _check_all_stated(values: dict[str, Any]) -> None:
    """Raise ValueError for a field without default that is not stated: the parser would take null for an Optional."""
    for name, group in GROUPS.items():
        for item in dataclasses.fields(group):
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if (required or item.metadata == STATED) and item.name not in (values.get(name) or {}):
                raise ValueError(f"{name}.{item.name} is missing; a field that changes results has no default: state it in the "
                                 f"recipe or with --{name}.{item.name}=VALUE")


def _with_classes(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the number of classes of their index in place of `model.classes: auto`."""
    if values["model"]["classes"] != AUTO:
        return values
    data = values["data"]
    packed = data.get("packed") if data.get("tier") in ("packed", "streamed") else None
    try:
        _, header = read_header(Path(packed or data["index"]))
    except ValueError as error:
        raise ValueError(f"model.classes (=auto) is that of the index: {error}") from None
    return dict(_merge(values, {"model": {"classes": len(header.classes)}}))


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
    return _text(config.as_dict())


def _text(values: dict[str, Any]) -> str:
    return str(yaml.dump(values, Dumper=Dumper, sort_keys=False))


def load(path: Path) -> Config:
    """The config of a recipe, or of a run's config.yaml. Raises ValueError as `parse`."""
    return parse(["--config", str(path)]).config
