"""The reference pages, made from the program itself: `python -m tools.docs.reference` writes docs/configuration.md, from the
dataclasses of a recipe, docs/commands.md, from the parsers, and docs/errors.md. A test finds them out of date.
"""
import argparse
import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import docstring_parser
import jinja2

from model.config import Conv, Full
from pipeline.io_errors import CAUSES
from tools import alexnet
from train.exit_codes import EXIT_CODES
from train.recipe import keys as recipe

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


_SHOWN = {None: "*required*", "empty": "empty"}  # defaults that are no values


def configuration() -> str:
    """A table for each group of a recipe, its nested groups after it."""
    parts = [CONFIGURATION]
    layers = (*recipe.groups(Conv, "model.layers.conv…"), *recipe.groups(Full, "model.layers.fc…"))
    for name, kind, keys in (*recipe.groups(), *layers):
        if not keys:
            continue
        text = docstring_parser.parse(kind.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
        parts.append(f"## {name}\n\n{text.short_description} {text.long_description or ''}\n")
        parts.append("| key | type | default | what |\n|---|---|---|---|")
        parts += [f"| `{key.name}` | {key.type} | {_SHOWN.get(key.default, f'`{key.default}`')} | "
                  f"{key.about.replace('``', '`')} |" for key in keys]
        parts.append("")
    return "\n".join(parts)


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
    printed, mistakes = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(mistakes):
        try:
            code = alexnet.main([*words, "--help"])
        except SystemExit as done:
            code = done.code
    if code:
        raise ValueError(f"command (=alexnet {' '.join(words)}) has no help: {mistakes.getvalue().strip()}; see alexnet --help")
    return printed.getvalue()


def errors() -> str:
    """Exit codes and causes, of the program's own lists."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True)
    template = (DOCS / "errors.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(codes=EXIT_CODES, causes=CAUSES, names=errno.errorcode)


def pages() -> dict[Path, str]:
    """The text of each page."""
    return {DOCS / "configuration.md": configuration(), DOCS / "commands.md": commands(), DOCS / "errors.md": errors()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
