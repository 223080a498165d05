"""The generated set is shaped as ILSVRC2012, with its traps, and is a function of its arguments."""
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from tools.demo import dataset as make_demo
from tools.demo.images import COLOURS, SHAPES, classes, draw, encode

SIDES = (24, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert make_demo.make(out, 3, 6, 4, 2, SIDES) == {"train": 6 * 4 + 5, "val": 12, "classes": 6}
    return out


def train_members(folder: Path) -> dict[str, bytes]:
    members = {}
    with tarfile.open(folder / make_demo.TRAIN) as outer:
        for inner in outer:
            with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
                for member in archive:
                    assert member.name.startswith(inner.name.removesuffix(".tar") + "_")
                    members[member.name] = archive.extractfile(member).read()
    return members


def devkit(folder: Path) -> tuple[np.ndarray, list[int]]:
    with tarfile.open(folder / make_demo.DEVKIT) as archive:
        base = "ILSVRC2012_devkit_t12/data"
        mat = loadmat(io.BytesIO(archive.extractfile(f"{base}/meta.mat").read()), squeeze_me=True)["synsets"]
        truth = archive.extractfile(f"{base}/ILSVRC2012_validation_ground_truth.txt").read().split()
    return mat, [int(line) for line in truth]


def test_same_arguments_same_bytes_other_seed_other_bytes(folder: Path, tmp_path: Path) -> None:
    names = (make_demo.TRAIN, make_demo.VAL, make_demo.DEVKIT)
    make_demo.make(tmp_path / "again", 3, 6, 4, 2, SIDES)
    make_demo.make(tmp_path / "other", 4, 6, 4, 2, SIDES)
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
    with tarfile.open(folder / make_demo.TRAIN) as outer:
        assert sorted(name.removesuffix(".tar") for name in outer.getnames()) == sorted(wnids)
    assert sorted(truth) == sorted(list(range(1, 7)) * 2)


def test_validation_members_are_out_of_name_order_and_truth_follows_names(folder: Path) -> None:
    with tarfile.open(folder / make_demo.VAL) as archive:
        names = archive.getnames()
        assert names != sorted(names)
        assert sorted(names) == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 13)]
        synsets, truth = devkit(folder)
        for position in (1, 7, 12):
            colour, shape = str(synsets[truth[position - 1] - 1]["words"]).removesuffix(", toy").split()
            data = archive.extractfile(f"ILSVRC2012_val_{position:08d}.JPEG").read()
            earlier = truth[:position - 1].count(truth[position - 1])
            assert data == encode(draw(3, colour, shape, 10 ** 6 + earlier, SIDES))


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
    red = np.mean([draw(0, "red", shape, k, (60, 60)).reshape(-1, 3).mean(0) for k in range(12)], axis=0)
    blue = np.mean([draw(0, "blue", shape, k, (60, 60)).reshape(-1, 3).mean(0) for k in range(12)], axis=0)
    assert red[0] - red[2] > blue[0] - blue[2] + 10


def test_pictures_vary_in_size_and_direction() -> None:
    sizes = [draw(0, colour, "star", k).shape[:2] for k in range(10) for colour in list(COLOURS)[:2]]
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
    import re
    assert make_demo.main(["--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert re.match(message, error) and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert make_demo.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (f"error: output folder (={tmp_path}/file) cannot be written (File exists); "
                                       "give another --out\n")


@pytest.mark.parametrize("before", [False, True])
def test_ctrl_c_leaves_no_archive_half_written(tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--classes", "4", "--per-class", "2", "--val-per-class", "1", "--sides", "24", "40"]
    if before:
        assert make_demo.main(words) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0

    def interrupted(*arguments: object) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(make_demo, "_tar", interrupted)
    capsys.readouterr()
    assert make_demo.main(words) == 130
    assert capsys.readouterr().err.strip() == "interrupted; no archive was left half-written"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
