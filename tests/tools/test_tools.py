"""The commands: --help is quick, errors are one line and exit 2, sheets show what was drawn."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.bench import __main__ as bench
from tools.demo import __main__ as demo, dataset as make_demo
from tools.show import batch as show_batch, kernels as show_kernels

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [[path.relative_to(ROOT).as_posix()] for path in sorted((ROOT / "tools").rglob("*.py"))
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8")] + [["-m", "train.main"], ["-m", "train.evaluate"]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_imports_neither_torch_nor_dali_nor_scipy(words: list[str]) -> None:
    result = subprocess.run([sys.executable, "-X", "importtime", *words, "--help"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0 and "usage:" in result.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "argparse" in imported
    assert imported & {"torch", "nvidia.dali", "scipy", "matplotlib"} == set()


@pytest.mark.parametrize("tool, words", [(bench, []), (show_batch, ["--config", "x", "--out", "y"]), (demo, []),
                                         (show_kernels, ["--run", "x", "--out", "y"])])
def test_ctrl_c_is_one_line_and_exit_130(tool: object, words: list[str], monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "run", interrupted)
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


# --- show_batch.py

def test_a_sheet_shows_the_crops_that_were_drawn(index: Path, tmp_path: Path) -> None:
    """The restored crops are the squares of the index cut where the captions say, within lighting and JPEG rounding."""
    from pipeline import DataConfig, SampleIndex, Stats, eval_loader, train_loader
    for mean in ("image", "image_center", "channel"):
        data = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.0, mean=mean)
        found = SampleIndex.load(index)
        stats = Stats.for_index(found, 76)
        with train_loader("archives", found, "train", data, 8, 5, stats) as loader:
            batch = next(iter(loader))
            drawn = loader.augmentation(batch.ids, batch.epochs)
        crops = show_batch.restore(batch, drawn, data, stats)
        with eval_loader("archives", found, "train", data, 8, None, skip_corrupt=True) as squares:
            pixels = {int(id): image.numpy() for part in squares for id, image in zip(part.ids, part.images)}
        for row, id in enumerate(batch.ids):
            crop = pixels[int(id)][drawn.top[row]:drawn.top[row] + 67, drawn.left[row]:drawn.left[row] + 67]
            crop = crop[:, ::-1] if drawn.mirror[row] else crop
            # region decode and whole decode round the resize differently by at most a grey level or two
            assert np.abs(crop.astype(int) - crops[row]).mean() < 0.5
        text = show_batch.captions(found, batch, drawn, stats)[0]
        assert f"id {batch.ids[0]}, epoch 0" in text and f"at {drawn.top[0]}, {drawn.left[0]}" in text
        assert text.splitlines()[0] in {"red ball", "red box", "blue ball", "blue box"}


def test_show_batch_writes_a_png(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(ROOT / "train/recipes/demo.yaml"), "--index", str(index), "--out",
             str(tmp_path / "a" / "s.png")]
    assert show_batch.main([*words, "--count", "9"]) == 0, capsys.readouterr().err
    with Image.open(tmp_path / "a" / "s.png") as sheet:
        assert sheet.size[0] > 1000
    assert show_batch.main([*words, "--count", "0"]) == 2
    assert "--count (=0) must lie in 1..200; " in capsys.readouterr().err
    assert show_batch.main([*words, "--step", "-1"]) == 2
    assert "--step (=-1) must be at least 0; " in capsys.readouterr().err


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"matplotlib is not installed.*; pip install -e '\.\[plots\]'"):
        show_batch.need_matplotlib()


# --- show_kernels.py

def test_kernels_are_stretched_one_by_one_and_laid_out_by_tower() -> None:
    kernels = np.random.default_rng(0).normal(size=(96, 3, 11, 11)) * np.arange(1, 97)[:, None, None, None]
    kernels[5] = 0.25
    pictures = show_kernels.stretch(kernels)
    assert pictures.shape == (96, 11, 11, 3)
    others = np.delete(pictures, 5, 0)
    assert (others.min(axis=(1, 2, 3)) == 0).all() and (others.max(axis=(1, 2, 3)) == 1).all()
    assert (pictures[5] == 0.5).all()
    assert pictures[7].argmax() == kernels[7].transpose(1, 2, 0).argmax()
    board = show_kernels.sheet(kernels, 2, scale=1)
    # 16 in a row, three rows a tower (figure 3 of the paper), a gap of 3 between towers
    assert board.shape == (6 * 15 + 4 + 3, 16 * 15 + 4, 3)
    np.testing.assert_array_equal(board[4:15, 4:15], pictures[0])
    np.testing.assert_array_equal(board[3 * 15 + 3 + 4:3 * 15 + 3 + 15, 15 + 4:15 + 15], pictures[49])


def test_kernels_of_no_checkpoint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_kernels.main(["--checkpoint", str(tmp_path / "no"), "--out", str(tmp_path / "k.png")]) == 2
    assert "does not exist; give a run folder or a checkpoint" in capsys.readouterr().err


# --- README.md

def test_the_loader_in_another_loop_works_as_the_readme_says(index: Path) -> None:
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    seen: list[tuple[int, ...]] = []
    exec(code.replace('"demo/index"', repr(str(index))).replace("batch=64", "batch=6"),
         {"step": lambda images, labels: seen.append((*images.shape, *labels.shape))})
    assert seen == [(6, 3, 67, 67, 6)] * 6      # 35 of 36 files are not empty; the last batch begins the next epoch
