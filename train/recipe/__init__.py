"""Recipes (YAML files) and command lines: parsed strictly into a `Config`, and written back.

A recipe has the groups of train/config.py; `--group.key=value` overrides a value, and `extends: OTHER.yaml` (relative to the
file, or one that comes with this program) inherits all that a recipe does not state. A value that changes results must be
stated, null included, and a key that nothing reads is an error.
"""
import dataclasses
import functools
import math
import textwrap
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import yaml

from model.config import LAYER_NAME, ModelConfig, layer_kind
from pipeline.config import STATED
from pipeline.index.header import read_header
from train.cli import nearest
from train.config import Config
from train.recipe.strict_yaml import MOST_BYTES, Dumper, load_yaml, read_yaml

GROUPS: dict[str, type] = typing.get_type_hints(Config)
AUTO = "auto"  # as model.classes: the number of classes of the index
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FLAGS = ("--resume", "--print-config", "--print_config", "--help", "-h", "--help-config", "--list")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in quotes"}


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line."""
    config: Config
    resume: bool
    recipe: Path  # the last one named


def find_recipe(name: str | Path, folder: Path = Path(), shipped: Path = RECIPES, what: str = "recipe", blame: str = "") -> Path:
    """The file that `name` means: a path, relative to `folder`, or the name of one that comes with this program. Raises
    ValueError, with `blame`, when there is none."""
    path, ours = folder / name, shipped / f"{str(name).removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if Path(name).name == str(name) and ours.is_file():
        return ours
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    instead = nearest(path.stem, names) or f"give a YAML file, or one of {textwrap.shorten(', '.join(names), 80)}"
    raise ValueError(f"{what} (={path}) {'is no file' if path.exists() else 'does not exist'}; {instead}{blame}")


def read_recipe(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of the one it extends: mappings are merged, all else is replaced. `children` are the
    recipes that extend this one. Raises ValueError when it is no mapping, has an unknown key, or extends itself."""
    if path.resolve() in (other.resolve() for other in children):
        raise ValueError(f"extends (={path.name} in {children[-1]}) leads back to itself; take one of the lines away")
    try:
        with path.open(encoding="utf-8") as file:
            values, lines = read_yaml(file.read(MOST_BYTES + 1))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe (={path}) is no YAML: {error}; correct it there") from None
    if values is None:
        raise ValueError(f"recipe (={path}) is empty; begin with a line such as extends: demo, then what differs")
    if not isinstance(values, dict):
        raise ValueError(f"recipe (={path}) must be groups of keys, not a {type(values).__name__}; see train/recipes/demo.yaml")
    _without_across(values.get("model"))
    parent = values.pop("extends", None)
    _check(values, Config, (), lambda keys: f" in {path}" + (f", line {lines[keys]}" if keys in lines else ""))
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"extends (={parent} in {path}) must be the name of a recipe beside it; correct it")
    found = find_recipe(parent, path.parent, blame=f", or correct extends in {path}")
    return dict(_merge(read_recipe(found, (*children, path)), values))


def _without_across(model: Any) -> None:
    """Runs of version 0.1 say model.lrn.across: false; windows never cross towers now."""
    if isinstance(model, dict) and isinstance(model.get("lrn"), dict) and model["lrn"].get("across") is False:
        del model["lrn"]["across"]


def model_config(values: Any) -> ModelConfig:
    """The network of plain values, as a recipe's `model` has them. Raises ValueError; TypeError for `classes: auto`."""
    _without_across(values)
    _check(values, ModelConfig, ("model",), lambda keys: "")
    _check_finite(values, "model")
    built: ModelConfig = _build(values, ModelConfig, "model")
    return built


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

    known = _known(kind)
    if keys[:-1] == ("model", "layers"):
        need(bool(LAYER_NAME.fullmatch(keys[2])), "must have names conv1 … conv99 and fc1 … fc99; rename it")
        known = _known(layer_kind(keys[2])) or {}
        need(isinstance(value, (dict, type(None))), f"must say what the layer is; write {{{', '.join(known)}}}")
    elif keys == ("model", "layers"):
        need(isinstance(value, dict), "must map names to layers; write conv1: {kernels: 96, px: 11, …}")
        known = dict.fromkeys(map(str, value))
    elif known is not None:
        optional = len(keys) < 2 or type(None) in typing.get_args(kind)  # a group without a value is as if it were not there
        need(isinstance(value, dict) or value is None and optional, "must be a group of keys; write {key: value, …}")
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


def _build(value: Any, kind: Any, key: str = "") -> Any:
    """Checked values as what they configure: groups as dataclasses, lists as tuples. Raises ValueError for a missing field."""
    known = _known(kind)
    if known is not None and value is not None:
        configures: Any = next(inner for inner in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(inner))
        for item in dataclasses.fields(configures):
            has_none = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if (has_none or item.metadata == STATED) and item.name not in value:
                name = f"{key}.{item.name}".lstrip(".")
                raise ValueError(f"{name} is missing; a field that changes results has no default: state it in the recipe or "
                                 f"with --{name}=VALUE")
        return configures(**{name: _build(inner, known[name], f"{key}.{name}".lstrip(".")) for name, inner in value.items()})
    if key == "model.layers":
        return {name: _build(layer, layer_kind(name), f"{key}.{name}") for name, layer in value.items()}
    if isinstance(value, list) and kind is not Any:
        inner_kind = next(inner for inner in (kind, *typing.get_args(kind)) if typing.get_origin(inner) is tuple)
        return tuple(_build(inner, typing.get_args(inner_kind)[0], key) for inner in value)
    return float(value) if kind is float else value


def parse(argv: Sequence[str]) -> CommandLine:
    """Parse a command line: a recipe, values that it sets, --resume; --print-config prints the whole recipe and exits 0. Several
    --config are laid over each other. Raises ValueError for an unknown or missing key, or a value of the wrong type or range."""
    paths, settings, flags = _split(argv)
    if not paths:
        raise ValueError("RECIPE (=none) must be given, such as demo; `alexnet train --list` lists what comes with this program")
    values: dict[str, Any] = {}
    for path in paths:
        values = _merge(values, read_recipe(path))
    values = {name: group for name, group in _merge(values, settings).items() if group is not None}
    _check_finite(values)
    config = _build(_with_classes({name: {} for name in GROUPS} | values), Config)
    if {"--print-config", "--print_config"} & flags:
        print(dump(config), end="")
        raise SystemExit(0)
    return CommandLine(config, "--resume" in flags, paths[-1])


def _split(argv: Sequence[str]) -> tuple[list[Path], dict[str, Any], set[str]]:
    """The recipes named on a command line; the values that it sets; its flags."""
    paths: list[Path] = []
    settings: dict[str, Any] = {}
    positional, rest = "", list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--")
        if word in FLAGS:
            continue
        if not word.startswith("-"):
            if positional:
                raise ValueError(f"recipe (={word}) is a second one beside {positional}; to lay it over that, write --config "
                                 f"{word}")
            positional = word
            paths.append(find_recipe(word))
            continue
        if key != "config" and key not in _all_keys() and not key.startswith("model.layers."):
            near = nearest(name, [f"--{key}" for key in _all_keys()] + ["--config", *FLAGS])
            raise ValueError(f"{name} (={value if equals else 'none'}) is no option; {near or 'see --help'}")
        if not equals:
            if not rest:
                raise ValueError(f"{name} (=none) must have a value; write {name}=VALUE")
            value = rest.pop(0)
        if key == "config":
            paths.append(find_recipe(value))
            continue
        settings = _merge(settings, _setting(key, value))
    return paths, settings, set(argv).intersection(FLAGS)


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


def _with_classes(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the number of classes of their index in place of `model.classes: auto`."""
    if values["model"].get("classes") != AUTO:
        return values
    data = values["data"]
    packed = data.get("packed") if data.get("tier") in ("packed", "streamed") else None
    key, path, maker = ("packed", packed, "pack") if packed else ("index", data.get("index", ""), "index build")
    if not Path(path).exists():
        raise ValueError(f"data.{key} (={path}) does not exist; give --data.{key}=FOLDER, made with `alexnet {maker}`")
    _, header = read_header(Path(path))
    if len(header.classes) == 1:
        raise ValueError(f"data.{key} (={path}) has only one class, {header.classes[0].wnid}; put the images of each class into "
                         "a folder of its own, and index that again")
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


def dump(config: Config) -> str:
    """The resolved recipe as YAML; `load` gives the same config back."""
    return str(yaml.dump(config.as_dict(), Dumper=Dumper, sort_keys=False))


def load(path: str | Path) -> Config:
    """The config of a recipe, or of a run's config.yaml. Raises ValueError as `parse`."""
    return parse([f"--config={path}"]).config
