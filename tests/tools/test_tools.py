"""The commands: --help is quick, errors are one line and exit 2."""
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench import __main__ as bench
from tools.demo import __main__ as demo, dataset as make_demo
from tools.show import __main__ as show, kernels

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [[path.relative_to(ROOT).as_posix()] for path in sorted((ROOT / "tools").rglob("*.py"))
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8")] + [["-m", "train.main"], ["-m", "train.evaluate"]]

# A terminal, or a locale without coercion, that knows ASCII only: what it lacks is replaced.
ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "POSIX"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_neither_torch_nor_dali_nor_scipy(words: list[str]) -> None:
    result = subprocess.run([sys.executable, "-X", "importtime", *words, "--help"], cwd=ROOT, capture_output=True,
                            text=True, env={**os.environ, **ASCII})
    assert result.returncode == 0 and "usage:" in result.stdout and result.stdout.isascii()
    imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "argparse" in imported
    assert imported & {"torch", "nvidia.dali", "scipy", "matplotlib"} == set()


@pytest.mark.parametrize("tool, module, words", [(bench, bench, []), (demo, demo, []),
                                                 (show, kernels, ["kernels", "--run", ".", "--out", "y.png"])])
def test_ctrl_c_is_one_line_and_exit_130(tool: object, module: object, words: list[str], monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    assert tool.main(words) == 130      # type: ignore[attr-defined]
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools import build_index, compute_stats
    folder = tmp_path_factory.mktemp("small")
    make_demo.make(folder, 0, 4, 8, 2, (80, 100))
    assert build_index.main(["build", "ilsvrc2012", "--train", str(folder / make_demo.TRAIN), "--val",
                             str(folder / make_demo.VAL), "--devkit", str(folder / make_demo.DEVKIT),
                             "--out", str(folder / "index")]) == 0
    assert compute_stats.main([str(folder / "index"), "--square-px", "76"]) == 0
    return folder / "index"


# --- README.md

def test_the_loader_in_another_loop_works_as_the_readme_says(index: Path) -> None:
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"photos.index"', repr(str(index))).replace("batch_size=64", "batch_size=6"), names)
    with names["loader"] as loader:
        assert (*names["images"].shape, *names["labels"].shape) == (6, 3, 224, 224, 6)
        assert names["state"] == loader.state_dict()
