"""The demo: its synthetic set is shaped as ILSVRC2012, with its traps; it runs every step and removes nothing but its own."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.io import loadmat

from tests.conftest import TinySet
from tools.demo import __main__ as demo, dataset
from tools.demo.images import COLOURS, SHAPES, classes, encode, render

ROOT = Path(__file__).resolve().parents[2]

SIDES = (24, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert dataset.make(out, 3, 6, 4, 2, SIDES) == {"train": 6 * 4 + 5, "val": 12, "classes": 6}
    return out


def train_members(folder: Path) -> dict[str, bytes]:
    members = {}
    with tarfile.open(folder / dataset.TRAIN) as outer:
        for inner in outer:
            with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
                for member in archive:
                    assert member.name.startswith(inner.name.removesuffix(".tar") + "_")
                    members[member.name] = archive.extractfile(member).read()
    return members


def devkit(folder: Path) -> tuple[np.ndarray, list[int]]:
    with tarfile.open(folder / dataset.DEVKIT) as archive:
        base = "ILSVRC2012_devkit_t12/data"
        mat = loadmat(io.BytesIO(archive.extractfile(f"{base}/meta.mat").read()), squeeze_me=True)["synsets"]
        truth = archive.extractfile(f"{base}/ILSVRC2012_validation_ground_truth.txt").read().split()
    return mat, [int(line) for line in truth]


def test_same_arguments_same_bytes_other_seed_other_bytes(folder: Path, tmp_path: Path) -> None:
    names = (dataset.TRAIN, dataset.VAL, dataset.DEVKIT)
    dataset.make(tmp_path / "again", 3, 6, 4, 2, SIDES)
    dataset.make(tmp_path / "other", 4, 6, 4, 2, SIDES)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_devkit_has_inner_nodes_and_ids_out_of_wnid_order(folder: Path) -> None:
    synsets, truth = devkit(folder)
    assert synsets.dtype.names == ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
                                   "wordnet_height", "num_train_images")
    leaves = [row for row in synsets if row["num_children"] == 0]
    assert len(leaves) == 6 and len(synsets) == 9
    assert [int(row["ILSVRC2012_ID"]) for row in synsets] == list(range(1, 10))
    wnids = [str(row["WNID"]) for row in leaves]
    assert wnids != sorted(wnids) and len(set(wnids)) == 6 and all(len(wnid) == 9 for wnid in wnids)
    with tarfile.open(folder / dataset.TRAIN) as outer:
        assert sorted(name.removesuffix(".tar") for name in outer.getnames()) == sorted(wnids)
    assert sorted(truth) == sorted(list(range(1, 7)) * 2)


def test_validation_members_are_out_of_name_order_and_truth_follows_names(folder: Path) -> None:
    with tarfile.open(folder / dataset.VAL) as archive:
        names = archive.getnames()
        assert names != sorted(names)
        assert sorted(names) == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 13)]
        synsets, truth = devkit(folder)
        for position in (1, 7, 12):
            colour, shape = str(synsets[truth[position - 1] - 1]["words"]).removesuffix(", toy").split()
            data = archive.extractfile(f"ILSVRC2012_val_{position:08d}.JPEG").read()
            earlier = truth[:position - 1].count(truth[position - 1])
            assert data == encode(render(3, colour, shape, 10 ** 6 + earlier, SIDES))


def test_one_of_each_oddity(folder: Path) -> None:
    found = {}
    for data in train_members(folder).values():
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            kind = (image.format, image.mode)
        except OSError as error:
            kind = ("broken", "empty" if not data else "cut" if "runcated" in str(error) else str(error))
        found[kind] = found.get(kind, 0) + 1
    assert found == {("JPEG", "RGB"): 24, ("PNG", "RGB"): 1, ("JPEG", "CMYK"): 1, ("JPEG", "L"): 1,
                     ("broken", "empty"): 1, ("broken", "cut"): 1}


@pytest.mark.parametrize("count", [4, 5, 10, 12, 13, 36])
def test_every_shape_and_colour_is_shared(count: int) -> None:
    kinds = classes(count)
    assert len(set(kinds)) == count
    first_colour = [shape for colour, shape in kinds if colour == kinds[0][0]]
    assert len(first_colour) >= 2
    assert len([colour for colour, shape in kinds if shape == kinds[0][1]]) >= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_shows_its_colour(shape: str) -> None:
    """Averaged over pictures, those of red things are redder, though the ground may be of any colour."""
    red = np.mean([render(0, "red", shape, k, (60, 60)).reshape(-1, 3).mean(0) for k in range(12)], axis=0)
    blue = np.mean([render(0, "blue", shape, k, (60, 60)).reshape(-1, 3).mean(0) for k in range(12)], axis=0)
    assert red[0] - red[2] > blue[0] - blue[2] + 10


def test_pictures_vary_in_size_and_direction() -> None:
    sizes = [render(0, colour, "star", k).shape[:2] for k in range(10) for colour in list(COLOURS)[:2]]
    assert any(height > width for height, width in sizes) and any(width > height for height, width in sizes)
    assert all(90 <= min(size) <= 160 and max(size) <= 1.5 * min(size) for size in sizes)


@pytest.mark.parametrize("words, message", [
    (["--seed", "-5"], r"error: seed \(=-5\) must be at least 0; choose another"),
    (["--classes", "3"], r"error: classes \(=3\) must lie in 4\.\.36; choose"),
    (["--per-class", "0"], r"error: per-class \(=0\) must be at least 1; "),
    (["--val-per-class", "0"], r"error: val-per-class \(=0\) must be at least 1; "),
    (["--sides", "60", "50"], r"error: sides \(=60 50\) must be two numbers of pixels"),
])
def test_errors_are_one_line_and_exit_2(words: list[str], message: str, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert dataset.main(["--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert re.match(message, error) and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert dataset.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: file (={tmp_path}/file) is there already; give another name\n"


@pytest.mark.parametrize("before", [False, True])
def test_ctrl_c_leaves_no_archive_half_written(tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--classes", "4", "--per-class", "2", "--val-per-class", "1", "--sides", "24", "40"]
    if before:
        assert dataset.main(words) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0

    def interrupted(*arguments: object) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(dataset, "_tar", interrupted)
    capsys.readouterr()
    assert dataset.main(words) == 130
    assert capsys.readouterr().err.strip() == "interrupted; no archive was left half-written"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


# --- the command

def test_archives_are_found_by_name(tmp_path: Path) -> None:
    for name in (dataset.TRAIN, dataset.VAL, dataset.DEVKIT, "readme.txt"):
        (tmp_path / name).touch()
    found = demo.find_archives(tmp_path)
    assert [path.name for path in found] == [dataset.TRAIN, dataset.VAL, dataset.DEVKIT]


def test_a_folder_without_archives_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "must hold exactly one *train*.tar (found: none); put ILSVRC2012_img_train.tar" in capsys.readouterr().err
    (tmp_path / "a_train.tar").touch()
    (tmp_path / "b_train.tar").touch()
    with pytest.raises(ValueError, match=r"found: a_train.tar, b_train.tar"):
        demo.find_archives(tmp_path)


def test_a_missing_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path), "--recipe", "no.yaml"]) == 2
    assert "recipe (=no.yaml) does not exist; give a YAML file, or one of " in capsys.readouterr().err


def test_a_failing_step_ends_the_demo_with_its_code() -> None:
    steps = demo.Demo(Console(file=io.StringIO()))
    assert steps.run("fine", [sys.executable, "-c", "print(7)"], "python -c …", capture=True) == "7\n"
    with pytest.raises(SystemExit) as failed:
        steps.run("broken", [sys.executable, "-c", "raise SystemExit(75)"], "python -c …")
    assert failed.value.code == 75
    assert list(steps.seconds) == ["fine"]


def test_an_interrupted_demo_lets_its_step_save(tmp_path: Path) -> None:
    """Ctrl-C at a terminal reaches both; the step needs a while."""
    child = ("import time, pathlib\ntry:\n    print('ready', flush=True); time.sleep(20)\nexcept KeyboardInterrupt:\n"
             f"    time.sleep(1); pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n")
    parent = ("import sys; from rich.console import Console; from tools.demo import __main__ as demo\n"
              f"demo.run = lambda *_: demo.Demo(Console(stderr=True, file=open('/dev/null', 'w'))).run("
              f"'x', [sys.executable, '-c', {child!r}], 'x')\n"
              "raise SystemExit(demo.main([]))")
    run = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    os.killpg(run.pid, signal.SIGINT)
    assert run.communicate(timeout=20)[1] == "interrupted\n" and run.returncode == 130
    assert (tmp_path / "saved").exists()


def test_a_demo_removes_only_what_was_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = tmp_path / "demo/runs/tiny100/config.yaml"
    real.parent.mkdir(parents=True)
    real.touch()
    assert demo.main(["--out", str(tmp_path / "demo")]) == 2
    assert (f"error: output folder (={tmp_path}/demo) must be new, empty or of an earlier demo with generated images, for it is "
            "made anew; give another --out (make demo OUT=…), or remove it\n") == capsys.readouterr().err
    assert real.exists()
    clean = ["make", "-s", "-f", str(ROOT / "Makefile"), "clean"]
    subprocess.run(clean, cwd=tmp_path, check=True)
    assert real.exists()
    demo.check_out(tmp_path / "new", True)
    (tmp_path / "demo" / demo.MARK).touch()
    demo.check_out(tmp_path / "demo", True)
    with pytest.raises(ValueError, match=r"output folder \(=.*demo\) holds a demo with generated images, which the next on"):
        demo.check_out(tmp_path / "demo", False)
    subprocess.run(clean, cwd=tmp_path, check=True)
    assert not (tmp_path / "demo").exists()


def test_a_demo_marks_its_folder_first_and_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: demo.Demo, title: str, *_: object, **__: object) -> str:
        assert title == "generate the archives" and (tmp_path / "demo" / demo.MARK).exists()
        raise SystemExit(3)

    monkeypatch.setattr(demo.Demo, "run", fails)
    for _ in range(2):
        with pytest.raises(SystemExit, match="3"):
            demo.main(["--out", str(tmp_path / "demo")])
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


def test_an_index_of_other_archives_is_refused(tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tiny_set.index
    demo.check_index(index, demo.find_archives(tiny_set.folder))
    dataset.make(tmp_path, 1, 4, 1, 1, (24, 40))
    os.makedirs(tmp_path / "out")
    os.symlink(index, tmp_path / "out/index")
    assert demo.main(["--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: index (={tmp_path}/out/index) is that of other archives ({index.parent}/ILSVRC2012_img_tr")
    assert error.endswith(f"{tmp_path}/ILSVRC2012_img_val.tar; give another --out (make demo OUT=…)\n")


def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    """Two epochs on the synthetic archives: every step runs, and the table tells the counts of the saved checkpoint."""
    archives = tmp_path / "archives"
    dataset.make(archives, 0, 4, 10, 3, (80, 100))
    result = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--out", str(tmp_path / "out"), "--data", str(archives), "--recipe",
         "train/recipes/demo.yaml", "--", "--train.epochs=2", "--train.batch=16", "--schedule.milestones=[]",
         "--machine.torch_threads=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "43 training images, 12 tested, 4 classes" in result.stdout
    assert "guessing" in result.stdout and "75.0%" in result.stdout
    assert f"run folder: {tmp_path / 'out' / 'runs' / 'demo'}" in result.stdout
    lines = (tmp_path / "out" / "runs" / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    test = [json.loads(line) for line in lines if json.loads(line)["kind"] == "test"]
    assert test[0]["images"] == 12
    ten = next(line for line in result.stdout.splitlines() if "ten crops" in line)
    assert f"{test[0]['top1']:.1%}" in ten
