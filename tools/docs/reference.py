"""Pages of the documentation made from the program itself whenever the site is built: `configuration.md` from the dataclasses.

A hook of MkDocs (mkdocs.yml): the pages are not kept in the repository, so they cannot be out of date.
"""
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import docstring_parser

from model.config import Conv, Full
from train.config import Config

CONFIGURATION = """# Configuration reference

Every key of a recipe, made from the classes that read it. `--group.key=VALUE` on the command line overrides a recipe, and
`--print-config` prints the whole. A key marked *required* must be in the recipe, or in the one it `extends`. Keys of `machine`
and `parallel` change no result, up to rounding.
"""


def configuration() -> str:
    """A table for each group of a recipe, its nested groups after it."""
    hints = typing.get_type_hints(Config)
    parts = [part for item in dataclasses.fields(Config) for part in _group(item.name, hints[item.name])]
    parts += [*_group("model.layers.conv…", Conv), *_group("model.layers.fc…", Full)]
    return "\n".join([CONFIGURATION, *parts])


def keys() -> set[str]:
    """Every key that the page has, with its group."""
    return set(re.findall(r'^\| `([\w.…]+)` \|', configuration(), re.MULTILINE))


def _group(name: str, kind: type) -> Iterator[str]:
    text = docstring_parser.parse(kind.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    about = {param.arg_name: " ".join((param.description or "").split()).replace("``", "`") for cls in reversed(kind.__mro__)
             for param in docstring_parser.parse(cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE).params}
    yield f"## {name}\n\n{text.short_description} {text.long_description or ''}\n"
    yield "| key | type | default | what |\n|---|---|---|---|"
    inner = []
    for item, hint in ((item, typing.get_type_hints(kind)[item.name]) for item in dataclasses.fields(kind)):
        nested = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        inner += [(f"{name}.{item.name}", one) for one in nested]
        default = _default(item)
        yield f"| `{name}.{item.name}` | {_type(hint)} | {default} | {about.get(item.name, '')} |"
    yield ""
    for key, one in inner:
        yield from _group(key, typing.cast(type, one))


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default_factory is not dataclasses.MISSING:
        return f"`{item.default_factory()}`"
    if item.default is dataclasses.MISSING or item.metadata.get("recipe") == "stated":
        return "*required*"
    if item.default in ("", ()):
        return "empty"
    value = [float(f"{number:.4g}") for number in item.default] if isinstance(item.default, tuple) else item.default
    return f"`{json.dumps(value)}`".replace('"', "")


def _type(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if typing.get_origin(hint) is tuple:
        return f"list of {_type(args[0])}s"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type, args))
    if type(None) in args:
        return f"{_type(args[0])} or `null`"
    if dataclasses.is_dataclass(hint):
        return "group"
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}.get(hint, "mapping")
