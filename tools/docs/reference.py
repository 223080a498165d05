"""The reference pages, made from the program itself: `python -m tools.docs.reference` writes docs/configuration.md, from the
dataclasses of a recipe, docs/commands.md, from the parsers, and docs/errors.md. A test finds them out of date.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import docstring_parser

from model.config import Conv, Full
from tools import alexnet, errors
from train.config import Config

CONFIGURATION = """# Configuration reference

Every key of a recipe, made from the classes that read it. `--group.key=VALUE` on the command line overrides a recipe, and
`--print-config` prints the whole. A key marked *required* must be in the recipe, or in the one it `extends`. Keys of `machine`
and `parallel` change no result, up to rounding. (Made by `python -m tools.docs.reference`.)
"""
COMMANDS = """# Command reference

The `--help` of every command. `alexnet VERB` runs from any folder. Exit codes: [Troubleshooting](errors.md). (Made by `python -m
tools.docs.reference`.)
"""
DOCS = Path(__file__).resolve().parents[2] / "docs"


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


def commands() -> str:
    """The help of each command and of the commands below it."""
    parts = [COMMANDS]
    with patch.dict(os.environ, {"COLUMNS": "110", "NO_COLOR": "1"}):
        for verb in alexnet.VERBS:
            parts += _command([verb])
    return "\n".join(parts)


def _command(words: list[str]) -> Iterator[str]:
    text = help_text(words)
    yield f"{'#' * (1 + min(len(words), 3))} alexnet {' '.join(words)}\n\n```text\n{text.rstrip()}\n```\n"
    for name in re.findall(r"^    ([a-z][\w-]*)(?=  |$)", text.partition("positional arguments:\n")[2].partition("\n\n")[0],
                           re.MULTILINE):  # verbs; options and arguments begin at the second column
        yield from _command([*words, name])


def help_text(words: list[str]) -> str:
    """What `alexnet WORDS --help` prints. Raises ValueError when there is no such command."""
    printed, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            code = alexnet.main([*words, "--help"])
        except SystemExit as done:
            code = done.code
    if code:
        raise ValueError(f"command (=alexnet {' '.join(words)}) has no help: {errors.getvalue().strip()}; see alexnet --help")
    return printed.getvalue()


def pages() -> dict[Path, str]:
    """The text of each page."""
    return {DOCS / "configuration.md": configuration(), DOCS / "commands.md": commands(), DOCS / "errors.md": errors.page()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
