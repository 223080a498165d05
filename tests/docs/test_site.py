"""The documentation builds without a warning and without a network; what it says of keys and files is so."""
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from tools.docs import reference
from train.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [path for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]) if path.name != "lab-log.md"]
GROUPS = "data|model|optimizer|schedule|train|machine|parallel|init_from"


def below(prefix: str, kind: Any) -> list[str]:
    """The keys of a configuration class, by its type hints, with those of the classes within it."""
    inner = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
    hints = typing.get_type_hints(inner) if inner else {}
    return [key for name, hint in hints.items() for key in ([f"{prefix}{name}"] * bool(prefix)) + below(f"{prefix}{name}.", hint)]


def keys_of_the_page() -> set[str]:
    """Every key that the configuration reference has, with its group."""
    return set(re.findall(r'^\| `([\w.…]+)` \|', reference.configuration(), re.MULTILINE))


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is not installed")
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)], cwd=ROOT,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert {"index.html", "loader.html", "configuration.html"} <= pages.keys()
    assert not [name for name, text in pages.items() if re.search(r'<(script|link|img)[^>]*(src|href)="https?:', text)]
    # A list or a table that GitHub shows is plain text without an empty line before it, or with code indented by 2 and not 4.
    prose = {name: re.findall(r"<(p|li|td)>(.*?)</\1>", re.sub(r"<pre.*?</pre>", "", text, flags=re.S), re.S)
             for name, text in pages.items()}
    assert not [(name, text) for name, found in prose.items() for _, text in found
                if re.search(r"^\s*([-*] |\d+\. |\|.*\||```|#+ )", text, re.M)]
    assert "machine.prefetch" in pages["configuration.html"] and "state_dict" in pages["loader.html"]


def test_the_generated_pages_are_what_the_program_says() -> None:
    """Else: python -m tools.docs.reference."""
    assert [path.name for path, text in reference.pages().items() if path.read_text(encoding="utf-8") != text] == []
    assert "## alexnet train\n" in reference.commands() and "#### alexnet index build classes\n" in reference.commands()


def test_the_configuration_reference_has_every_key_and_no_other() -> None:
    keys = keys_of_the_page()
    assert {key for key in keys if "…" not in key} == set(below("", Config))
    assert {"model.layers.conv….stride", "model.layers.fc….neurons"} <= keys
    assert not re.findall(r"^\| `\S+` \| .* \|  \|$", reference.configuration(), re.MULTILINE), "a key without a description"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_keys_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = keys_of_the_page()
    named = set(re.findall(rf"(?:`|--)((?:{GROUPS})\.[a-z0-9_.]*[a-z0-9_])(?==|`|:)", text))
    files = set(re.findall(r"`((?:pipeline|model|train|tools|tests|docs|examples)/[\w./-]+\.(?:py|yaml|md|ipynb|sbatch))`", text))
    named = {key for key in named if not key.startswith("model.layers.") and not key.endswith((".py", ".onnx", ".safetensors"))}
    wrong = {key for key in named if key not in known
             and not (ROOT / key.replace(".", "/")).exists() and not (ROOT / f"{key.replace('.', '/')}.py").exists()}
    assert not wrong, f"{page.name} names keys that no recipe has: {sorted(wrong)}"
    assert not {name for name in files if not (ROOT / name).exists()}, f"{page.name} names files that are not there"
