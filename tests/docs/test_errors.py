"""The messages that docs/errors.md quotes are those of the program, and the page has its lists."""
import ast
import re
from pathlib import Path

import pytest

from pipeline.io_errors import CAUSES
from tools.docs.reference import DOCS, errors
from train.exit_codes import EXIT_CODES

ROOT = Path(__file__).resolve().parents[2]
# What stands for a value in a quoted message.
VALUE = re.compile(r"…|;|\(=[^)]*\)|\b(?:N|M|HOST|KEY|step|pid)\b|/?\w+\.(?:jsonl|log)")


def texts() -> list[str]:
    """The string constants of the program, joined where Python joins them."""
    return [node.value for folder in ("pipeline", "model", "train", "tools") for path in (ROOT / folder).rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)]


SAID = texts()
TABLE = (DOCS / "errors.md.jinja").read_text(encoding="utf-8").partition("## Messages by kind")[2].partition("\n## ")[0]
QUOTED = [quoted for line in TABLE.splitlines()[4:] if line.startswith("|")
          for quoted in re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", line)[1])]


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_of_the_program(quoted: str) -> None:
    pieces = [piece.strip(" ;:,()") for piece in VALUE.split(quoted)]
    for piece in filter(None, pieces):
        assert any(piece in text for text in SAID), piece


def test_the_page_has_the_kinds_that_are_raised_most() -> None:
    """Of the rules that the program's errors name, each that it names four times or more is quoted."""
    rules = re.findall(r"must be|must not exceed|does not exist|is not in the index|cannot be read|exists already|is in use by"
                       r"|is not as it|is not the one of|is truncated|holds no images", " ".join(SAID))
    for rule in {rule for rule in rules if rules.count(rule) >= 4}:
        assert any(rule in quoted for quoted in QUOTED), rule


def test_the_page_has_every_exit_code_and_cause() -> None:
    text = errors()
    assert all(f"| {code} | " in text for code in EXIT_CODES) and all(cause in text for cause, _ in CAUSES.values())
