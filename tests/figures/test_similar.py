"""Features on disk, queries, the sheets and the command of similar images (paper figure 4, right)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from pipeline.files import with_own_hash
from pipeline.index.header import ClassInfo
from pipeline.index.sample_index import SampleIndex
from pipeline.index.writer import mark_excluded
from tests.conftest import TinySet
from tests.helpers.figures import brute_force, check_apart, show
from tests.helpers.loaders import eval_loader
from tests.helpers.small_set import photographs, write_set
from tests.helpers.trained_run import write_run
from tools.show.similar import Picture, draw
from train.checkpoint.resolve import class_name, load_trained, resolve
from train.evaluate.metrics import share_interval
from train.figures.features import FEATURES, IDS, MANIFEST, Features, build
from train.figures.neighbours import Queries, chosen_ids, precision, search


def test_precision_by_hand() -> None:
    mean, interval = precision(np.array([0, 1]), np.array([[0, 0, 1], [0, 0, 1]]))
    count = 0.25 / (np.var([2 / 3, 1 / 3], ddof=1) / 2)  # of independent images whose mean varies as much
    assert mean == pytest.approx(0.5) and interval == pytest.approx(share_interval(0.5, count))
    assert precision(np.array([0] * 9), np.array([[0, 0]] * 9)) == (1.0, share_interval(1.0, 9))
    assert precision(np.array([0]), np.array([[0, 1]])) == (0.5, share_interval(0.5, 1))


# --- features on disk

@pytest.fixture(scope="module")
def run(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of which the first is the best."""
    return write_run(tmp_path_factory.mktemp("similar"), tiny_set, (0.4, 0.6))


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "small"
    assert show("similar", "build", "--run", run, "--which", "best", "--out", out) == 0
    return out


def test_features_are_those_of_the_network(run: Path, built: Path, tiny_set: TinySet) -> None:
    found = Features.load(built)
    index = SampleIndex.load(tiny_set.index)
    left_out = set(index.ids("train").tolist()) - set(found.ids.tolist())
    assert left_out == set(found.skipped) and len(left_out) == 1, "the set has one file that cannot be decoded"
    assert (found.source.layer, found.source.split, found.rows.shape) == ("fc7", "train", (75, 16))
    assert isinstance(found.rows, np.memmap) and found.rows.dtype == np.float32 and (np.diff(found.ids) > 0).all()
    with load_trained(resolve(run / "checkpoints/step-000000000")) as trained:
        found.check(trained)
        with eval_loader("archives", index, "train", trained.config.data, 1, trained.stats, skip_corrupt=True) as loader:
            for place, batch in enumerate(loader):
                one = trained.network.features(batch.images[:, :, 4:71, 4:71])  # the centre: 67 of 76
                np.testing.assert_allclose(found.rows[place], one[0].detach().numpy(), rtol=1e-4, atol=1e-5)  # other sums
        assert not trained.network.training and found.rows.std(0).max() > 0.01, "the test would not see other images"
    blocks = list(found.blocks())
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), found.rows)


def altered(built: Path, folder: Path) -> Path:
    shutil.copytree(built, folder / "copy")
    return folder / "copy"


@pytest.mark.parametrize("name", [FEATURES, IDS])
def test_damaged_features_are_refused(built: Path, tmp_path: Path, name: str) -> None:
    copy = altered(built, tmp_path)
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"features file \(=.*{name}\) has SHA-256 .*, was written with .*; build the f"):
        Features.load(copy)
    (copy / name).write_bytes(data[:-4])
    with pytest.raises(ValueError, match=rf"features file \(=.*{name}\) has {len(data) - 4} bytes, was written with {len(data)}"):
        Features.load(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=rf"features file \(=.*{name}\) is missing; build the features again"):
        Features.load(copy)


def test_other_folders_and_manifests_are_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features folder \(=.*nowhere\) does not exist; make one with `python -m tools"):
        Features.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"features folder \(=.*\) has no manifest.json: it was never finished, or is somet"):
        Features.load(tmp_path)
    copy = altered(built, tmp_path)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    for changed, message in ((manifest | {"images": 3}, r"does not match its SHA-256, so it was altered; build the features"),
                             (with_own_hash({"format": 2}), r"features format \(=2 in .*\) must be 1, the one of this progr")):
        (copy / MANIFEST).write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Features.load(copy)
    for text in "[]", "{", "{}":
        (copy / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"features manifest \(=.*\) (is not|does not match).*; build the features again"):
            Features.load(copy)


def test_what_is_there_is_not_overwritten(run: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("similar", "build", "--run", run, "--split", "val", "--out")
    assert show(*words, built) == 2
    assert f"features folder (={built}) exists already; give the name of a new folder" in capsys.readouterr().err
    assert show(*words, tmp_path / "new/val") == 0
    assert capsys.readouterr().out == f"24 images of split val, 16 features each at fc7, in {tmp_path}/new/val\n"
    assert Features.load(tmp_path / "new/val").source.split == "val"


def test_a_build_that_fails_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with load_trained(resolve(run, "best"), batch=10) as trained:
        def fails(done: int, total: int) -> None:
            if done > 30:
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            build(trained, "train", tmp_path / "new", fails)
        assert not list(tmp_path.iterdir())
        with torch.no_grad():
            trained.network.get_parameter("fc7.bias").fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"features \(=NaN or infinite\) of .* must be finite; its weights are damaged"):
            build(trained, "train", tmp_path / "nan")


# --- queries

def test_drawn_queries_are_a_function_of_the_seed(tiny_set: TinySet) -> None:
    index = SampleIndex.load(tiny_set.index)
    first, splits = chosen_ids(index, "val", 5, 0, None)
    again, other = (chosen_ids(index, "val", 5, seed, None)[0].tolist() for seed in (0, 1))
    assert first.tolist() == again != other and splits == ["val"] * 5
    assert len(set(first.tolist())) == 5 and set(first.tolist()) <= set(index.ids("val").tolist())


def test_a_network_of_one_full_layer_has_features_of_its_last_convolution(tiny_set: TinySet, tmp_path: Path) -> None:
    flat = write_run(tmp_path, tiny_set, fc6="    fc6: null", fc7="    fc7: null")
    assert show("similar", "build", "--run", flat, "--split", "val", "--out", tmp_path / "features") == 0
    assert Features.load(tmp_path / "features").source.layer == "conv5"


def query(built: Path, *words: str) -> int:
    return show("similar", "query", "--features", built, *words)


def test_the_search_equals_brute_force(run: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = Features.load(built)
    with load_trained(resolve(run, "best"), batch=5) as trained:
        queries, among = Queries.of(trained, "val", trained.index.ids("val")), Queries.of(trained, "train", features.ids[[5, 0]])
        pixels = Queries.of(trained, "train", features.ids).crops.reshape(len(features.ids), -1)
        labels, shares = trained.index.samples["label"], {}
        for kind, rows in (("fc7", np.array(features.rows)), ("pixels", pixels)):
            for asked in queries, among:
                mine = asked.features if kind == "fc7" else asked.crops.reshape(len(asked.ids), -1)
                near = search(trained, features, asked, 4, kind == "pixels", lambda done, total: None)
                np.testing.assert_array_equal(near, brute_force(mine, features.ids, rows, 4, asked.ids)[0])
                assert not (near == asked.ids[:, None]).any(), "an image is not its own neighbour"
                shares.setdefault(kind, (labels[near] == asked.labels[:, None]).mean())
    assert query(built, "--count", "24", "--neighbours", "4") == 0
    out = capsys.readouterr().out
    assert out.startswith("24 queries, 4 nearest of 75 images of split train\nof the query's class by fc7: ")
    for kind, share in shares.items():
        assert f"of the query's class by {kind}: {share:.1%}, 95% interval over queries " in out
    assert query(built, "--count", "24", "--no-pixels") == 0 and "pixels" not in capsys.readouterr().out


def test_json_names_queries_and_neighbours_by_id(built: Path, tmp_path: Path, tiny_set: TinySet,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert query(built, "--count", "3", "--neighbours", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    index, known = SampleIndex.load(tiny_set.index), Features.load(built).ids.tolist()
    assert [one["id"] for one in found["queries"]] == chosen_ids(index, "val", 3, 0, None)[0].tolist()
    for one in found["queries"]:
        for kind in "fc7", "pixels":
            assert len(one["nearest"][kind]) == 2 and {near["id"] for near in one["nearest"][kind]} <= set(known)
    low, high = found["of_the_querys_class"]["fc7"]["interval"]
    assert 0 <= low <= found["of_the_querys_class"]["fc7"]["share"] <= high <= 1
    assert query(built, "--count", "3", "--neighbours", "2", "--json", str(tmp_path / "new/near.json")) == 0
    assert json.loads((tmp_path / "new/near.json").read_text()) == found and "3 queries" in capsys.readouterr().out


def test_words_on_the_sheet_neither_overlap_nor_leave_it() -> None:
    crop = np.zeros((9, 9, 3), np.uint8)
    words = ["American Staffordshire terrier", "W" * 45, "crab", "soft-coated wheaten terrier", "a$b$c_{",
             "computer\x1b\nkeyboard", "?"]
    shown = [Picture(crop, text, same) for text, same in zip(words, [True, False, None, *[True] * 4])]
    rows = [(shown[place], {"fc7": shown[1:], "pixels": shown[:6]}) for place in range(3)]
    figure = draw(rows, "a long title of a sheet " * 12).figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.findobj(Text) if text.get_text() and
             text.axes is None] + [axes.bbox for axes in figure.axes]
    assert len(boxes) > 2 * 3 * 6 + 39
    check_apart(boxes, figure.bbox)


def test_the_command_writes_a_png(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert query(built, "--count", "2", "--seed", "1", "--out", str(tmp_path / "new/a.PNG")) == 0
    with Image.open(tmp_path / "new/a.PNG") as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 1000
    assert f"2 queries, 6 nearest of 75 images of split train, in {tmp_path}/new/a.PNG\n" in capsys.readouterr().out


def test_features_of_another_checkpoint_or_index_are_refused(run: Path, built: Path, tmp_path: Path, tiny_set: TinySet,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    assert query(built, *out, "--run", str(run)) == 2  # the last, not the best
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint (={run}/checkpoints/step-000000001) is not the one that the features of {built}")
    assert error.endswith("; give that one, or build the features again\n")
    assert query(built, *out, "--run", str(run), "--which", "best") == 0
    copy = shutil.copytree(tiny_set.index, tmp_path / "index")
    index = SampleIndex.load(copy)
    assert query(built, *out, "--index", str(copy)) == 0, "a copy is the same"
    mark_excluded(index, {3: ("x", "damaged")})
    assert query(built, *out, "--index", str(copy)) == 2
    assert f"index (={copy}) is not the one that the features of" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--out", "a.jpg"], "--out (=a.jpg) must end in .png, which is what is written; correct the name"),
    (["--out", "a.png", "--count", "0"], "queries (=0) must lie in 1..40, as larger sheets cannot be read; without --out"),
    (["--out", "a.png", "--count", "41"], "queries (=41) must lie in 1..40"),
    (["--count", "25"], "images (=25) must lie in 1..24, the images of split val; ask for that many"),
    (["--count", "0"], "images (=0) must lie in 1..24"),
    (["--count", "2", "--neighbours", "0"], "neighbours (=0) must lie in 1..74"),
    (["--count", "2", "--neighbours", "75"], "neighbours (=75) must lie in 1..74"),
    (["--count", "2", "--split", "no"], "split (=no) is not in the index"),
    (["--out", "a.png", "--ids", "5", "5"], "id (=5) is given twice; give it once"),
    (["--out", "a.png", "--ids", "5000"], "id (=5000) is not in the index"),
    (["--out", "a.png", "--checkpoint", "nowhere"], "RUN (=nowhere) does not exist; give a run folder, such as"),
    (["--out", "a.png", "--which", "best"], "--which (=best) chooses among a run's checkpoints, and")])
def test_bad_arguments_are_one_line_and_exit_2(built: Path, words: list[str], message: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert query(built, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path, photographs(3), photographs(3))
    with pytest.raises(ValueError, match=r"has other classes, or another order of them, than the one the network was"):
        with load_trained(resolve(run), index=other.path):
            pass


def test_words_of_classes(tiny_set: TinySet) -> None:
    classes = [ClassInfo("n1", "great cat, Felis magna"), ClassInfo("n2", "")]
    assert [class_name(classes, label) for label in (-1, 0, 1, 2)] == ["?", "great cat", "n2", "class 2"]
