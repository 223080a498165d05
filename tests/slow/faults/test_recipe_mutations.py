"""Recipes and command lines with mistakes, seeded and counted: each is refused in a line, at once, or means what it says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Callable

import pytest
import yaml

from tests.helpers.recipes import TEXT
from tests.helpers.trials import Row, flipped
from train.recipe import parse
from train.recipe.strict_yaml import Dumper, load_yaml

WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1.5, -0.0, 1e-300, 1e300, 1e30, 10 ** 6, 10 ** 12, 10 ** 19, -10 ** 19, 10 ** 500,
    float("nan"), float("inf"), 0.999, 0.9999999, "", "x", "010", "1:30", "1_0.0", "yes", "~", "é", "a/b", "..", "\0", "\udcc3",
    "x" * 5000, "0x10", "1e3", "2001-01-01", [], [1], [[]], {}, {"a": 1}, {"a": {"b": []}}, [None], [{"epoch": 1}]]
NUMBERS = 40, 2000  # trials of the quick tier, of the long one
TIERS = pytest.mark.parametrize("count", [NUMBERS[0], pytest.param(NUMBERS[1], marks=pytest.mark.slow)])


def leaves(values: Any, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Keys of all values, groups included."""
    found = [keys] if keys else []
    for key, inner in values.items() if isinstance(values, dict) else ():
        found += leaves(inner, (*keys, key))
    return found


def changed(values: dict[str, Any], keys: tuple[str, ...], value: Any, name: str | None = None) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(values))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    inner[name or keys[-1]] = value
    return copy


def at(values: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        values = values.get(key)  # a layer that is null is taken away
    return values


def equal(ours: Any, theirs: Any) -> bool:
    """Whether a config holds what a recipe says: a whole number may be a float, a group holds more."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(key in ours and equal(ours[key], value) for key, value in theirs.items())
    if isinstance(ours, float) and isinstance(theirs, str):
        return ours == float(theirs)  # a number in quotes, as every value of the command line is
    return bool(ours == theirs) and all(isinstance(ours, kind) == isinstance(theirs, kind) for kind in (bool, str))


VALUES = load_yaml(TEXT)
KEYS = leaves(VALUES)


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.dump(values, Dumper=Dumper, sort_keys=False), encoding="utf-8", errors="surrogateescape")
    return path


def read(path: Path, *words: str) -> dict[str, Any]:
    return parse(["--config", str(path), *words]).config.as_dict()


def row(name: str) -> Row:
    read_once = parse  # imports of the first call are not counted
    assert read_once
    return Row(name, limit_s=3.0)  # one second on an idle machine


@TIERS
def test_values(tmp_path: Path, count: int, record_property: Callable[[str, object], None]) -> None:
    trials = row("recipe: values")
    for draw in trials.draws(count):
        keys, value = draw.choice(KEYS), draw.choice(WEIRD)
        path = write(tmp_path, changed(VALUES, keys, value))
        trials.trial(f"{keys} = {value!r}", lambda: value in (None, {}) and len(keys) == 1 or equal(at(read(path), keys), value))
    trials.check(record_property)


@TIERS
def test_typos_in_keys(tmp_path: Path, count: int, record_property: Callable[[str, object], None]) -> None:
    trials = row("recipe: typos in keys")
    for draw in trials.draws(count):
        keys = draw.choice([keys for keys in KEYS if keys[:2] != ("model", "layers") or len(keys) > 3])
        name = typo(keys[-1], draw)
        path = write(tmp_path, changed(VALUES, keys, at(VALUES, keys), name))

        def refused() -> bool:
            try:
                read(path)
            except ValueError as error:
                assert f"{'.'.join((*keys[:-1], name))} (=" in str(error) and f" in {path}, line " in str(error), error
                raise
            return False
        trials.trial(f"{keys} → {name}", refused)
    trials.check(record_property)


def typo(name: str, draw: random.Random) -> str:
    while True:
        place, letter = draw.randrange(len(name) + 1), draw.choice("abcdefghijklmnopqrstuvwxyz_.-")
        changed = draw.choice((name[:place] + letter + name[place:], name[:place] + name[place + 1:], name[:place] + letter
                               + name[place + 1:], name.upper(), name[:place] + name[place:place + 2][::-1] + name[place + 2:]))
        if changed and changed != name and (*"", changed) not in [keys[-1:] for keys in KEYS] and changed not in EVERY_NAME:
            return changed


EVERY_NAME = {keys[-1] for keys in KEYS} | {"extends", "machine", "parallel", "init_from", "lars", "pad", "bias", "stride"}


@TIERS
def test_the_text_of_the_file(tmp_path: Path, count: int, record_property: Callable[[str, object], None]) -> None:
    trials, path = row("recipe: text"), tmp_path / "recipe.yaml"
    for draw in trials.draws(count):
        data, fault = flipped(TEXT.encode(), draw)
        path.write_bytes(data)
        trials.trial(fault, lambda: equal(read(path), {key: value for key, value in load_yaml(data.decode()).items()
                                                       if value is not None}))
    trials.check(record_property)


@TIERS
def test_the_command_line(tmp_path: Path, count: int, record_property: Callable[[str, object], None]) -> None:
    trials = row("recipe: command line")
    path = write(tmp_path, VALUES)
    for draw in trials.draws(count):
        keys, value = draw.choice(KEYS), draw.choice(WEIRD)
        text = value if isinstance(value, str) else json.dumps(value)
        name = ".".join(keys)
        if draw.random() < 0.3:
            name = ".".join((*keys[:-1], typo(keys[-1], draw)))
            trials.trial(f"--{name}={text}", lambda: read(path, f"--{name}={text}") is None)
            continue
        said = text if isinstance(at(VALUES, keys), str) else None
        trials.trial(f"--{name}={text}", lambda: equal(at(read(path, f"--{name}={text}"), keys), load_yaml(text) if said is None
                                                       else said) or load_yaml(text) in (None, {}) and len(keys) < 3)
    trials.check(record_property)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("text", [
    BOMB, "machine: &a {threads: *a}\n", "&a [*a]\n", "[" * 100_000, "{" * 100_000, "- " * 100_000, "a: " * 1000,
    "x: 1\n" * 10_000, "machine: 3\n",
    "machine: [1]\n", "? [1, 2]\n: 3\n", "{[1]: 2}\n", "a: !!python/object/apply:os.system [true]\n",
    "<<: {a: 1}\n", "a: !!set {b}\n", "\0", "\xff", "a: " + "9" * 100_000, "--- 1\n--- 2\n", "%YAML 9.9\n---\na: 1\n", "a: *b\n",
    "a: '\n", "x" * 2_000_000,
    "extends: /dev/zero\n", "extends: /dev/stdin\n", "extends: " + "x" * 5000 + "\n", "extends: \"\\0\"\n"])
def test_hostile_texts(tmp_path: Path, text: str, record_property: Callable[[str, object], None]) -> None:
    trials, path = row("recipe: hostile"), tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    trials.trial(text[:60], lambda: read(path) is None)
    trials.check(record_property)
