"""Schemas of what is read back from files: JSON values as typed dataclasses, or a one-line error.

A schema is a dataclass whose fields are int, float, str, bool, Path, list[T], dict[str, T], T | None, another schema, Any, or one
of these with rules: `Annotated[T, rule]`, where `rule(value)` gives the rule broken as a predicate, or "".
"""
import dataclasses
import functools
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def _rule(holds: Any, broken: str) -> Any:
    return lambda value: "" if holds(value) else broken


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in the folder itself: not empty, no path, not `.` or `..`."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"}


Count = Annotated[int, _rule(lambda value: 0 <= value < 1 << 63, "must be a number from 0 up")]
Sha256 = Annotated[str, _rule(re.compile("[0-9a-f]{64}").fullmatch, "must be 64 hexadecimal digits")]
FileName = Annotated[str, _rule(is_file_name, "must be the bare name of a file in the same folder")]


def read_as(kind: type[T], value: Any, name: str) -> T:
    """A JSON value as `kind`, a schema; keys it does not have are passed over. `name`: of the value, for messages.

    Raises ValueError `<name>.<key> (=value) must be …`, without what to do.
    """
    converted: T = _convert(kind, value, name)
    return converted


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _convert(arguments[0], value, name)
        for broken in filter(None, (rule(value) for rule in arguments[1:])):
            raise _error(name, value, broken)
        return value
    if origin in (Union, types.UnionType):  # T | None
        (other,) = set(arguments) - {type(None)}
        return None if value is None else _convert(other, value, name)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, name)
    if origin is list:
        _expect(list, value, name, "a list")
        return [_convert(arguments[0], each, f"{name}[{i}]") for i, each in enumerate(value)]
    if origin is dict:
        _expect(dict, value, name, "an object")
        return {_convert(arguments[0], key, f"key of {name}"): _convert(arguments[1], each, f"{name}.{key}")
                for key, each in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path:
        return Path(_convert(str, value, name))
    if kind is not Any:
        _expect(kind, value, name, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind])
    return value


def _dataclass(kind: Any, value: Any, name: str) -> Any:
    _expect(dict, value, name, "an object")
    found = {}
    for key, (hint, is_required) in _fields(kind).items():
        if key in value:
            found[key] = _convert(hint, value[key], f"{name}.{key}")
        elif is_required:
            raise ValueError(f"{name} (without {key}) must have it")
    return kind(**found)


@functools.cache
def _fields(kind: Any) -> Mapping[str, tuple[Any, bool]]:
    """Name → type, and whether it must be given."""
    hints, missing = get_type_hints(kind, include_extras=True), dataclasses.MISSING
    return {field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
            for field in dataclasses.fields(kind)}


def _expect(kind: type, value: Any, name: str, description: str) -> None:
    if type(value) is not kind:  # a bool is no number
        raise _error(name, value, f"must be {description}")


def _error(name: str, value: Any, broken: str) -> ValueError:
    text = repr(value)
    return ValueError(f"{name} (={text if len(text) <= 60 else text[:60] + '…'}) {broken}")
