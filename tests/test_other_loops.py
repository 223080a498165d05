"""docs/other-loops.md runs as it stands: each block in order, with the libraries that are installed."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinySet

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "other-loops.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TITLES = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)


def test_each_title_has_its_block() -> None:
    assert TITLES == ["Plain torch", "timm", "Lightning", "accelerate"] and len(BLOCKS) == 1 + len(TITLES)


@pytest.mark.parametrize("title", TITLES)
def test_a_block_runs(title: str, tiny_set: TinySet, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"timm": ["timm"], "Lightning": ["timm", "lightning"], "accelerate": ["timm", "accelerate"]}.get(title, [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    beginning = BLOCKS[0].replace('"demo/index"', repr(str(tiny_set.index))).replace("batch_size=64", "batch_size=16")
    assert str(tiny_set.index) in beginning and "batch_size=16" in beginning
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        if needed:
            warnings.simplefilter("ignore")  # other people's
        exec(compile(beginning, "beginning", "exec"), names)
        exec(compile("\n".join(f"import {name}" for name in needed), "imports", "exec"), names)
        exec(compile(BLOCKS[1 + TITLES.index(title)], title, "exec"), names)
    assert names["train"].step >= len(names["train"])
    if title == "Plain torch":
        assert f"of {tiny_set.val} right; waited" in capsys.readouterr().out
