"""The README is a page; the files, commands, options and recipes that it and the documentation name exist."""
import json
import re
import shlex
from pathlib import Path

import pytest

from tools import alexnet
from tools.docs.reference import help_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in ("lab-log.md", "commands.md"))]
RECIPES = {path.stem for path in (ROOT / "train/recipes").rglob("*.yaml")}


def commands(text: str) -> list[list[str]]:
    """Words of each line of shell blocks and of `alexnet …` in running text, without comments and continuations."""
    lines = [line for block in re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL)
             for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:alexnet|make) [^`]+)`", text)
    found = []
    for line in lines:
        if re.match(r"\s*(alexnet|make|torchrun|python3?) ", line):
            words = shlex.split(re.sub(r"[()\[\]*…]", "", line), comments=True)
            found.append(words)
    return found


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_pictures_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), f"{page} links to {path}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page.read_text(encoding="utf-8")):
        line = " ".join(words)
        if words[0] == "make":
            assert words[1] in targets, line
            continue
        for name in re.findall(r"(?:train/recipes|tools|docs)/[\w./-]+\.\w+", line):
            assert (ROOT / name).exists() or name.startswith("docs/results/bench"), line
        for module in re.findall(r"-m (?:-- )?((?:train|tools)[\w.]*)", line):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line
        if "alexnet" in words:
            verb, *rest = words[words.index("alexnet") + 1:]
            if verb.startswith("-") or verb == "VERB":
                continue
            assert verb in alexnet.VERBS, line
            path_of_verbs, text = [verb], help_text([verb])
            while rest and re.search(rf"^    {re.escape(rest[0])}(  |$)", text, re.MULTILINE):
                path_of_verbs.append(rest.pop(0))
                text = help_text(path_of_verbs)
            before_dashes = rest[:rest.index("--")] if "--" in rest else rest
            options = {word.partition("=")[0] for word in before_dashes if re.match(r"--?[a-z]", word) and "." not in word}
            assert not {option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)}, line
            if verb in ("train", "study") and rest and re.fullmatch(r"[a-z][a-z0-9_]*", rest[0]):
                assert rest[0] in RECIPES, line


def test_figures_of_the_readme_are_measured() -> None:
    """Rates and errors of its tables of tiers and results stand in a record of docs/results, its chart's in what drew it."""
    records = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/results").glob("*.md"))
    source = re.search(r"\((\S+-loaders\.json)\)", (ROOT / "docs/assets/loaders.svg").read_text("utf-8"))
    assert source is not None
    for side in json.loads((ROOT / "docs/results" / source[1]).read_text("utf-8"))["sides"]:
        records += f" {side['images_per_s']['median']:,.0f}"
    sections = [README.partition(f"## {title}\n")[2].partition("\n## ")[0] for title in ("Tiers", "Results")]
    rows = [line for section in sections for line in section.splitlines() if line.startswith("|")]
    figures = {figure for line in rows for figure in re.findall(r"\d{1,3}(?:,\d{3})+|\d+\.\d+", line)}
    assert len(figures) >= 8 and not {figure for figure in figures if figure not in records}
