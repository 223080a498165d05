"""Schemas of what is read back from files: JSON values as typed dataclasses, or a one-line error.

A schema is a dataclass whose fields are int, float, str, bool, Path, list[T], dict[str, T], T | None, another schema, Any, or one
of these with rules: `Annotated[T, rule]`, where `rule(value)` gives the rule broken as a predicate, or "".
"""
import dataclasses
import functools
import numbers
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}


def _rule(holds: Any, broken: str) -> Any:
    return lambda value: "" if holds(value) else broken


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself: not empty, no path, not `.` or `..`."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"}


# What a caller may give where these are asked for: NumPy's numbers too, but no bool as a number.
_GIVEN: dict[Any, tuple[Any, str]] = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"),
                                      bool: (bool, "True or False"), str: (str, "a text")}


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Raise TypeError `<prefix><name> (=value) must be …` for an argument that is not of its type. Only classes, tuples
    of numbers and unions of both are checked."""
    for name, value in values.items():
        if not _is_a(hints.get(name, Any), value):
            raise TypeError(f"{prefix}{name} (={value!r}) must be {_words(hints[name])}")


def _is_a(kind: Any, value: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is_a(each, value) for each in arguments)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_is_a(arguments[0], each) for each in value)
    if kind is Any or origin is not None or not isinstance(kind, type):
        return True
    return isinstance(value, _GIVEN.get(kind, (kind,))[0]) and (kind is bool or not isinstance(value, bool))


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is tuple:
        return "a tuple of numbers"
    return _GIVEN[kind][1] if kind in _GIVEN else "None" if kind is types.NoneType else f"a {kind.__name__}"


Count = Annotated[int, _rule(lambda value: 0 <= value < 1 << 63, "must be a number from 0 up")]
Sha256 = Annotated[str, _rule(re.compile("[0-9a-f]{64}").fullmatch, "must be 64 hexadecimal digits")]
FileName = Annotated[str, _rule(is_file_name, "must be the bare name of a file in the same folder")]


class _Broken(ValueError):
    """A rule that a value breaks; `place` is where it lies below the value that is read."""

    def __init__(self, problem: str, place: str = "") -> None:
        self.problem, self.place = problem, place


def read_as(kind: type[T], value: Any, name: str) -> T:
    """A JSON value as `kind`, a schema; keys it does not have are passed over. `name`: of the value, for messages.

    Raises ValueError `<name>.<key> (=value) must be …`, without what to do.
    """
    try:
        converted: T = _convert(kind, value)
    except _Broken as error:
        raise ValueError(f"{name}{error.place} {error.problem}") from None
    return converted


def _convert(kind: Any, value: Any) -> Any:
    if type(value) is kind:
        return value
    if kind in _PLAIN:
        if kind is float and type(value) is int:
            return float(value)
        raise _error(value, f"must be {_PLAIN[kind]}")  # a bool is no number
    if kind is Any:
        return value
    if kind is Path:
        return Path(_convert(str, value))
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _convert(arguments[0], value)
        for broken in filter(None, (rule(value) for rule in arguments[1:])):
            raise _error(value, broken)
        return value
    if origin in (Union, types.UnionType):  # T | None
        (other,) = set(arguments) - {type(None)}
        return None if value is None else _convert(other, value)
    if origin is list:
        _convert(list, value)
        return [_below(arguments[0], each, f"[{i}]") for i, each in enumerate(value)]
    assert origin is dict, f"{kind} is no schema"
    _convert(dict, value)
    return {_below(arguments[0], key, ", a key,"): _below(arguments[1], each, f".{key}") for key, each in value.items()}


def _below(kind: Any, value: Any, place: str) -> Any:
    try:
        return _convert(kind, value)
    except _Broken as error:
        raise _Broken(error.problem, place + error.place) from None


def _dataclass(kind: Any, value: Any) -> Any:
    _convert(dict, value)
    found = {}
    for key, (hint, is_required) in _fields(kind).items():
        if key in value:
            found[key] = value[key] if type(value[key]) is hint else _below(hint, value[key], f".{key}")
        elif is_required:
            raise _Broken(f"(without {key}) must have it")
    return kind(**found)


@functools.cache
def _fields(kind: Any) -> Mapping[str, tuple[Any, bool]]:
    """Name → type, and whether it must be given."""
    hints, missing = get_type_hints(kind, include_extras=True), dataclasses.MISSING
    return {field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
            for field in dataclasses.fields(kind)}


def _error(value: Any, broken: str) -> _Broken:
    text = repr(value)
    return _Broken(f"(={text if len(text) <= 60 else text[:60] + '…'}) {broken}")
