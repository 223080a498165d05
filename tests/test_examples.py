"""The examples run as they stand: the plain one always, those of other libraries where they are installed."""
import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from tests.helpers.small_set import photographs, write_set

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
NEEDED = {"timm_resnet18": ["timm"], "lightning_resnet18": ["timm", "lightning"]}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDED.get(path.stem, [])
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed")
    index = write_set(tmp_path, photographs(5), photographs(7)[5:])
    monkeypatch.setattr(sys, "argv", [path.name, "--index", str(index.path), "--steps", "3", "--batch-size", "2"])
    with warnings.catch_warnings():
        if needed:
            warnings.simplefilter("ignore")  # other people's
        runpy.run_path(str(path), run_name="__main__")
    assert re.search(r"3 steps of 2.*: [\d.]+ img/s, data wait [\d.]+%", capsys.readouterr().out)


def test_the_documentation_names_every_example() -> None:
    page = (EXAMPLES[0].parents[1] / "docs/loader.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 3 and [path.name for path in EXAMPLES if f"examples/{path.name}" not in page] == []
