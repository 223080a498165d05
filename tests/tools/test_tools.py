"""The commands: --help is quick, errors are one line and exit 2, sheets show what was drawn."""
import io
import json
import os
import signal
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


# --- demo.py

def test_archives_are_found_by_name(tmp_path: Path) -> None:
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz", "readme.txt"):
        (tmp_path / name).touch()
    found = demo.find_archives(tmp_path)
    assert (found.train.name, found.val.name, found.devkit.name) == (
        "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")


def test_a_folder_without_archives_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "must hold exactly one *train*.tar (found: none); put ILSVRC2012_img_train.tar" in capsys.readouterr().err
    (tmp_path / "a_train.tar").touch()
    (tmp_path / "b_train.tar").touch()
    with pytest.raises(ValueError, match=r"found: a_train.tar, b_train.tar"):
        demo.find_archives(tmp_path)


def test_a_missing_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path), "--recipe", "no.yaml"]) == 2
    assert "recipe (=no.yaml) does not exist; give one of train/recipes" in capsys.readouterr().err


def test_a_failing_step_ends_the_demo_with_its_code() -> None:
    from rich.console import Console
    steps = demo.Demo(Console(file=io.StringIO()))
    assert steps.step("fine", ["-c", "print(7)"], capture=True) == "7\n"
    with pytest.raises(demo.StepFailed) as failed:
        steps.step("broken", ["-c", "raise SystemExit(75)"])
    assert failed.value.code == 75
    assert list(steps.seconds) == ["fine"]


def test_an_interrupted_demo_lets_its_step_save(tmp_path: Path) -> None:
    """Ctrl-C at a terminal reaches both; the step needs a while."""
    child = ("import time, pathlib\ntry:\n    print('ready', flush=True); time.sleep(20)\nexcept KeyboardInterrupt:\n"
             f"    time.sleep(1); pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n")
    parent = ("from rich.console import Console; from tools import demo\n"
              f"demo.run = lambda *_: demo.Demo(Console(stderr=True, file=open('/dev/null', 'w'))).step('x', ['-c', {child!r}])\n"
              "raise SystemExit(demo.main([]))")
    run = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=20)[1] == "interrupted\n" and run.returncode == 130
    assert (tmp_path / "saved").exists()


def test_a_drawn_demo_removes_only_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = tmp_path / "demo/runs/tiny100/config.yaml"
    real.parent.mkdir(parents=True)
    real.touch()
    assert demo.main(["--out", str(tmp_path / "demo")]) == 2
    assert (f"error: output folder (={tmp_path}/demo) must be new, empty or of an earlier drawn demo, for it is made anew; give "
            "another --out (make demo OUT=…), or remove it\n") == capsys.readouterr().err
    assert real.exists()
    clean = ["make", "-s", "-f", str(ROOT / "Makefile"), "clean"]
    subprocess.run(clean, cwd=tmp_path, check=True)
    assert real.exists()
    demo.check_out(tmp_path / "new", True)
    (tmp_path / "demo" / demo.MARK).touch()
    demo.check_out(tmp_path / "demo", True)
    with pytest.raises(ValueError, match=r"output folder \(=.*demo\) holds a drawn demo, which the next one removes; give anoth"):
        demo.check_out(tmp_path / "demo", False)
    subprocess.run(clean, cwd=tmp_path, check=True)
    assert not (tmp_path / "demo").exists()


def test_a_drawn_demo_marks_its_folder_first_and_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: demo.Demo, title: str, words: list[str]) -> str:
        assert title == "draw the archives" and (tmp_path / "demo" / demo.MARK).exists()
        raise demo.StepFailed(3)

    monkeypatch.setattr(demo.Demo, "step", fails)
    for _ in range(2):
        assert demo.main(["--out", str(tmp_path / "demo")]) == 3
        assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo.MARK]
        (tmp_path / "demo/index").mkdir()       # of the first, gone at the second


def test_real_data_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(demo, "run", lambda out, *_: seen.append(out.name))
    monkeypatch.setattr(demo, "find_archives", lambda folder: None)
    assert demo.main([]) == demo.main(["--data", "x"]) == 0 and seen == ["demo", "demo-data"]
    for words, out in ([], "demo"), (["DATA=x"], "demo-data"), (["DATA=x", "OUT=y"], "y"):
        said = subprocess.run(["make", "-n", "demo", *words], cwd=ROOT, capture_output=True, text=True).stdout
        assert f"-m tools.demo --out {out} " in said.replace("\n", " ")


def test_an_index_of_other_archives_is_refused(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.check_index(index, demo.find_archives(index.parent))
    make_demo.make(tmp_path, 1, 4, 1, 1, (24, 40))
    os.makedirs(tmp_path / "out")
    os.symlink(index, tmp_path / "out/index")
    assert demo.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: index (={tmp_path}/out/index) is that of other archives ({index.parent}/ILSVRC2012_img_tr")
    assert error.endswith(f"{tmp_path}/ILSVRC2012_img_val.tar; give another --out (make demo OUT=…)\n")


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


def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    """Two epochs on the drawn archives: every step runs, and the table tells the counts of the saved checkpoint."""
    archives = tmp_path / "archives"
    make_demo.make(archives, 0, 4, 10, 3, (80, 100))
    result = subprocess.run(
        [sys.executable, "tools/demo/__main__.py", "--out", str(tmp_path / "out"), "--data", str(archives), "--recipe",
         "train/recipes/demo.yaml", "--", "--train.epochs=2", "--train.batch=16", "--schedule.milestones=[]",
         "--machine.torch_threads=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "43 training pictures, 12 tested, 4 classes" in result.stdout
    assert "guessing" in result.stdout and "75.0%" in result.stdout
    assert f"run folder: {tmp_path / 'out' / 'runs' / 'demo'}" in result.stdout
    lines = (tmp_path / "out" / "runs" / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    test = [json.loads(line) for line in lines if json.loads(line)["kind"] == "test"]
    assert test[0]["images"] == 12
    ten = next(line for line in result.stdout.splitlines() if "ten crops" in line)
    assert f"{test[0]['top1']:.1%}" in ten


# --- show_batch.py

def test_a_sheet_shows_the_crops_that_were_drawn(index: Path, tmp_path: Path) -> None:
    """The restored crops are the squares of the index cut where the captions say, within lighting and JPEG rounding."""
    from pipeline import DataConfig, SampleIndex, Stats, TestLoader, TrainLoader
    for mean in ("image", "image_center", "channel"):
        data = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.0, mean=mean)
        found = SampleIndex.load(index)
        stats = Stats.for_index(found, 76)
        with TrainLoader(found, "train", data, 8, 5, stats) as loader:
            batch = next(iter(loader))
            drawn = loader.draws(batch.ids, batch.epochs)
        crops = show_batch.restore(batch, drawn, data, stats)
        with TestLoader(found, "train", data, 8, None, skip_corrupt=True) as squares:
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
