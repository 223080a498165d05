"""Every key of a recipe with its type, default and meaning, from the configuration classes and their docstrings."""
import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import docstring_parser

from pipeline.config import STATED
from train.config import Config

_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe. `default` is None where it must be stated."""
    name: str
    type: str
    default: str | None
    about: str


def groups(kind: type = Config, name: str = "") -> Iterator[tuple[str, type, list[Key]]]:
    """A group of keys with its name and class, then the groups in it."""
    about: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for item in docstring_parser.parse(base.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE).params:
            about[item.arg_name] = " ".join((item.description or "").split())
    hints, found, inner = typing.get_type_hints(kind), list[Key](), list[tuple[str, type]]()
    for field in dataclasses.fields(kind):
        key, hint = f"{name}.{field.name}".lstrip("."), hints[field.name]
        nested = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
        if name or hint is not nested:  # of the whole, its groups are no keys
            found.append(Key(key, _type(hint), _default(field), about.get(field.name, "")))
        if nested is not None:
            inner.append((key, typing.cast(type, nested)))
    yield name, kind, found
    for key, one in inner:
        yield from groups(one, key)


def keys() -> Iterator[Key]:
    """The keys of a recipe, group by group."""
    for _, _, found in groups():
        yield from found


def _type(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(map(str, args))
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(args[0])}s"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _type(one) for one in args)
    return "group" if dataclasses.is_dataclass(hint) else _TYPES.get(hint, "mapping")


def _default(field: "dataclasses.Field[Any]") -> str | None:
    if field.metadata == STATED:
        return None
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return None
    if isinstance(value, tuple):
        return str([float(f"{number:.4g}") for number in value])
    return "empty" if value == "" else str(value) if isinstance(value, str) else json.dumps(value)


def as_text(width: int) -> str:
    """All keys, for --help-config."""
    lines = []
    for key in keys():
        lines.append(f"{key.name}  {key.type}, " + ("must be stated" if key.default is None else f"default {key.default}"))
        lines += textwrap.wrap(key.about, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
