"""Nearest neighbours: exact against brute force, features on disk, the sheets and the command (paper figure 4, right)."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.index.sample_index import SampleIndex
from pipeline.index.folders import index_of_files
from pipeline.tiers import eval_loader
from tests.conftest import TinySet
from tests.helpers.trained_run import write_run
from tools.show import similar, similar_sheet
from train.figures import features as folders
from train.figures.features import FEATURES, IDS, MANIFEST, Features
from train.figures.neighbours import NOBODY, Nearest, agreement
from train.figures.similar import chance, from_files, from_index, pick
from train.checkpoint.load_trained import class_name, load_trained
from train.checkpoint.resolve import resolve


def brute(queries: np.ndarray, ids: np.ndarray, rows: np.ndarray, count: int, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours one query at a time, in float64."""
    found, squares = [], []
    for query, self_id in zip(queries.astype(np.float64), own):
        distances = ((rows.astype(np.float64) - query) ** 2).sum(1)
        order = [place for place in np.lexsort((ids, distances)) if ids[place] != self_id][:count]
        found.append(ids[order])
        squares.append(distances[order])
    return np.array(found), np.array(squares)


def searched(queries: np.ndarray, ids: np.ndarray, rows: np.ndarray, count: int, own: np.ndarray, block: int) -> Nearest:
    nearest = Nearest(queries, count, own)
    for first in range(0, len(ids), block):
        nearest.add(ids[first:first + block], rows[first:first + block])
    return nearest


# --- the search

@pytest.mark.parametrize("kind", ["float", "bytes"])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_search_equals_brute_force(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(block)
    monkeypatch.setattr("train.figures.neighbours._MOST", 1 << 11)  # several groups of queries
    monkeypatch.setattr("train.figures.neighbours._EXACT", 1 << 9)
    draw = random.integers(0, 256, (340, 48), np.uint8)
    if kind == "float":
        draw = random.standard_normal((340, 48)).astype(np.float32)
    rows, ids = draw[:300], random.permutation(1000)[:300].astype(np.int64)
    queries = np.concatenate([draw[300:], rows[:20]])
    own = np.concatenate([np.full(40, -1), ids[:20]])
    nearest = searched(queries, ids, rows, 6, own, block)
    wanted = brute(queries, ids, rows, 6, own)
    np.testing.assert_array_equal(nearest.ids, wanted[0])
    np.testing.assert_allclose(nearest.squares, wanted[1], rtol=1e-12)
    assert not (nearest.ids[40:] == ids[:20, None]).any()


def test_what_float32_cancels_is_compared_exactly() -> None:
    """Far from the origin the formula alone gives other neighbours; the search does not."""
    random = np.random.default_rng(0)
    rows = (1000 + 0.01 * random.standard_normal((500, 64))).astype(np.float32)
    queries = (1000 + 0.01 * random.standard_normal((20, 64))).astype(np.float32)
    ids, own = np.arange(500), np.full(20, -1)
    a, b = torch.from_numpy(queries), torch.from_numpy(rows)
    formula = (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).topk(6, largest=False).indices.numpy()
    wanted, squares = brute(queries, ids, rows, 6, own)
    assert (formula != wanted).any(1).mean() > 0.9, "the test would not see cancellation"
    nearest = searched(queries, ids, rows, 6, own, 128)
    np.testing.assert_array_equal(nearest.ids, wanted)
    np.testing.assert_allclose(nearest.squares, squares, rtol=1e-9)


@pytest.mark.parametrize("block", [3, 50])
def test_of_equally_near_rows_the_smaller_id_comes_first(block: int) -> None:
    rows = np.repeat(np.random.default_rng(1).standard_normal((5, 33)).astype(np.float32), 10, axis=0)  # each ten times
    ids = np.random.default_rng(2).permutation(50).astype(np.int64)
    own = ids[:50:10].copy()
    nearest = searched(rows[:50:10], ids, rows, 6, own, block)
    for place in range(5):
        twins = sorted(set(ids[place * 10:place * 10 + 10].tolist()) - {int(own[place])})
        assert nearest.ids[place].tolist() == twins[:6] and (nearest.squares[place] == 0).all()


def test_few_rows_leave_places_empty() -> None:
    nearest = searched(np.zeros((2, 3), np.float32), np.array([4, 9]), np.eye(2, 3, dtype=np.float32), 3, np.array([-1, 9]), 2)
    assert nearest.ids.tolist() == [[4, 9, NOBODY], [4, NOBODY, NOBODY]]
    assert nearest.squares.tolist() == [[1, 1, np.inf], [1, np.inf, np.inf]]


def test_search_refuses_what_does_not_fit() -> None:
    queries = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"neighbours \(=0\) must be at least 1; the paper shows 6"):
        Nearest(queries, 0, np.full(2, -1))
    with pytest.raises(ValueError, match=r"queries \(=\(2, 3\)\) must be \(Q, D\), with \(3,\) ids"):
        Nearest(queries, 1, np.full(3, -1))
    for rows in np.zeros((1, 4), np.float32), np.zeros((1, 3), np.uint8):
        with pytest.raises(ValueError, match=r"rows \(=.*\) must be \(1, 3\) float32, as the queries; give features of"):
            Nearest(queries, 1, np.full(2, -1)).add(np.array([0]), rows)


def test_agreement_by_hand() -> None:
    mean, error = agreement(np.array([0, 1]), np.array([[0, 0, 1], [0, 0, 1]]))
    assert mean == pytest.approx(0.5) and error == pytest.approx(np.std([2 / 3, 1 / 3], ddof=1) / np.sqrt(2))
    assert agreement(np.array([0]), np.array([[0, 1]]))[0] == 0.5


# --- features on disk

@pytest.fixture(scope="module")
def run(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of which the first is the best."""
    return write_run(tmp_path_factory.mktemp("similar"), tiny_set, (0.4, 0.6))


@pytest.fixture(scope="module")
def built(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "small"
    assert similar.main(["build", "--run", str(run), "--which", "best", "--out", str(out)]) == 0
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
        with eval_loader("archives", index, "train", trained.config.data.pixels(), 1, trained.stats, skip_corrupt=True) as loader:
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
    with pytest.raises(ValueError, match=rf"features file \(=.*{name}\) is missing, was written with {len(data)}; "):
        Features.load(copy)


def test_other_folders_and_manifests_are_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features folder \(=.*nowhere\) does not exist; make one with "
                                         "tools/show/similar.py build"):
        Features.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"features folder \(=.*\) has no manifest.json: it was never finished, or is somet"):
        Features.load(tmp_path)
    copy = altered(built, tmp_path)
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    for change, message in ((("images", 3), r"does not match its SHA-256, so it was altered; build"),
                            (("format", 2), r"features format \(=2 in .*\) must be 1, the one of this program; build")):
        (copy / MANIFEST).write_text(json.dumps(manifest | dict([change])), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Features.load(copy)
    for text in "[]", "{", "{}":
        (copy / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"features manifest \(=.*\) is not one; build the features again"):
            Features.load(copy)


def test_what_is_there_is_not_overwritten_unless_asked(run: Path, built: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    copy, words = altered(built, tmp_path), ["build", "--run", str(run), "--split", "val", "--out"]
    assert similar.main([*words, str(copy)]) == 2
    assert "holds features already; give another name, or --force to replace them" in capsys.readouterr().err
    assert similar.main([*words, str(copy), "--force"]) == 0
    assert capsys.readouterr().out == f"24 images of split val, 16 features each at fc7, in {copy}\n"
    assert Features.load(copy).source.split == "val"
    (copy / "notes.txt").touch()
    assert similar.main([*words, str(copy), "--force"]) == 2
    error = capsys.readouterr().err
    assert f"features folder (={copy}) holds notes.txt, which is no part of features; give a new folder" in error
    assert similar.main([*words, str(copy / "notes.txt")]) == 2
    assert "notes.txt) is a file; give the name of a new folder" in capsys.readouterr().err


def test_a_build_that_fails_leaves_no_features(run: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = altered(built, tmp_path)
    with load_trained(resolve(run, "best"), batch=10) as trained:
        def fails(done: int, total: int) -> None:
            if done > 30:
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            folders.build(trained, "train", copy, force=True, progress=fails)
        assert not (copy / MANIFEST).exists() and not list(copy.glob(".*.tmp"))
        with pytest.raises(ValueError, match="it was never finished"):
            Features.load(copy)
        folders.build(trained, "train", copy)
        with torch.no_grad():
            trained.network.get_parameter("fc7.bias").fill_(float("nan"))
        with pytest.raises(RuntimeError, match=r"features \(=NaN or infinite\) of .* must be finite; its weights are damaged"):
            folders.build(trained, "train", tmp_path / "nan")


# --- queries

def test_ids_and_files_give_the_same_queries(run: Path, tiny_set: TinySet, tmp_path: Path) -> None:
    index = SampleIndex.load(tiny_set.index)
    ids = index.ids("val")[[5, 2]]
    files = []
    for place, id in enumerate(ids.tolist()):  # one called as what it is not
        files.append(tmp_path / ("a.jpg", "b.txt")[place])
        files[-1].write_bytes(index.read(id))
    with load_trained(resolve(run)) as trained:
        named, loose = from_index(trained, ids), from_files(trained, files)
    assert named.names == [f"val {id}" for id in ids] and loose.names == ["a.jpg", "b.txt"]
    np.testing.assert_array_equal(named.crops, loose.crops)
    np.testing.assert_array_equal(named.features, loose.features)
    assert named.ids.tolist() == ids.tolist() and loose.ids.tolist() == loose.labels.tolist() == [-1, -1]
    assert named.labels.tolist() == index.samples["label"][ids].tolist()
    assert named.crops.shape == (2, 67, 67, 3) and (named.crops[0] != named.crops[1]).any()


def test_a_png_is_a_query_too(tmp_path: Path) -> None:
    Image.new("RGBA", (90, 70), (200, 100, 50, 255)).save(tmp_path / "a.png")
    index = index_of_files([tmp_path / "a.png"], tmp_path / "scratch")
    assert (int(index.row(0)["width"]), int(index.row(0)["height"])) == (90, 70)


@pytest.mark.parametrize("data, message", [
    (b"", r"image \(=.*bad.jpg\) cannot be read: empty; give a JPEG or PNG file"),
    (b"words" * 99, r"image \(=.*bad.jpg\) cannot be read: not an image; give"),
    (None, r"image \(=.*bad.jpg\) does not exist; give a JPEG or PNG file")])
def test_files_that_are_no_images_are_named(tmp_path: Path, data: bytes | None, message: str) -> None:
    Image.new("RGB", (90, 70)).save(tmp_path / "good.png")
    if data is not None:
        (tmp_path / "bad.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        index_of_files([tmp_path / "good.png", tmp_path / "bad.jpg"], tmp_path / "scratch")


def test_a_file_that_cannot_be_decoded_is_named(run: Path, tmp_path: Path) -> None:
    Image.effect_noise((90, 70), 50).convert("RGB").save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x40\0\0\0\x40\x08\x02\0\0\0" + data)
    with load_trained(resolve(run)) as trained, pytest.raises(ValueError, match=r"image \(=.*cut.png\) cannot be dec"):
        from_files(trained, [tmp_path / "good.jpg", tmp_path / "cut.png"])


def test_drawn_queries_are_a_function_of_the_seed(tiny_set: TinySet) -> None:
    index = SampleIndex.load(tiny_set.index)
    first = pick(index, "val", 5, 0)
    assert first.tolist() == pick(index, "val", 5, 0).tolist() != pick(index, "val", 5, 1).tolist()
    assert len(set(first.tolist())) == 5 and set(first.tolist()) <= set(index.ids("val").tolist())
    with pytest.raises(ValueError, match=r"images \(=25\) must lie in 1..24, the images of split val; ask for that many"):
        pick(index, "val", 25, 0)


def test_a_network_of_one_full_layer_has_features_of_its_last_convolution(tiny_set: TinySet, tmp_path: Path) -> None:
    flat = write_run(tmp_path, tiny_set, fc6="    fc6: null", fc7="    fc7: null")
    assert similar.main(["build", "--run", str(flat), "--split", "val", "--out", str(tmp_path / "features")]) == 0
    assert Features.load(tmp_path / "features").source.layer == "conv5"


def asked(built: Path, *words: str) -> int:
    return similar.main(["query", "--features", str(built), *words])


def test_the_evaluation_equals_brute_force(run: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(built, "--evaluate", "24", "--neighbours", "4", "--split", "val", "--json", "--batch", "5") == 0
    told = json.loads(capsys.readouterr().out)
    features = Features.load(built)
    with load_trained(resolve(run, "best")) as trained:
        index, queries = trained.index, from_index(trained, trained.index.ids("val"))
        pixels = from_index(trained, features.ids).crops.reshape(len(features.ids), -1)
        random = chance(index, features, queries)
        among = chance(index, features, from_index(trained, features.ids[:1]))
    own, labels = np.full(24, -1), index.samples["label"]
    mine = queries.crops.reshape(24, -1)
    for kind, mine, rows in (("fc7", queries.features, np.array(features.rows)), ("pixels", mine, pixels)):
        near = brute(mine, features.ids, rows, 4, own)[0]
        assert told[kind]["precision"] == pytest.approx((labels[near] == queries.labels[:, None]).mean())
    assert (told["queries"], told["images"], told["neighbours"]) == (24, 75, 4)
    share = [(labels[features.ids] == label).mean() for label in queries.labels]
    assert told["chance"] == random == pytest.approx(np.mean(share))
    alike = (labels[features.ids] == labels[features.ids[0]]).sum()
    assert among == pytest.approx((alike - 1) / 74), "an image is not its own neighbour"
    assert asked(built, "--evaluate", "24", "--no-pixels") == 0
    out = capsys.readouterr().out
    assert "24 queries, 6 nearest of 75 images of split train\nof the query's class by fc7: " in out and "pixels" not in out


def test_a_training_image_is_not_its_own_neighbour(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(built, "--ids", "0", "5", "--neighbours", "70", "--out", str(tmp_path / "a.html"), "--no-pixels") == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.titles[0] == "train 0" and page.titles[71] == "train 5"
    assert "train 0" not in page.titles[1:71] and "train 5" not in page.titles[72:] and len(page.titles) == 142
    assert asked(built, "--ids", "0", "--neighbours", "75", "--out", str(tmp_path / "a.html")) == 2
    assert "neighbours (=75) must lie in 1..74, for" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page shows and asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.looks: list[str] = []
        self.alts: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "figure":
            self.titles.append(found["title"])
            self.looks.append(found["class"])
        if tag == "img":
            self.alts.append(found["alt"])
            self.sources.append(found["src"])
        self.links += [found[name] for name in ("href", "action", "srcset", "data") if name in found]
        assert tag not in ("script", "iframe", "b")


def test_the_page_needs_nothing_else_and_says_what_it_shows(built: Path, tiny_set: TinySet, tmp_path: Path) -> None:
    index = SampleIndex.load(tiny_set.index)
    id = int(index.ids("val")[3])
    assert asked(built, "--ids", str(id), "--out", str(tmp_path / "new/a.html")) == 0
    text = (tmp_path / "new/a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.alts) == 13 and all(page.alts)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert page.links == ["data:,"] and "url(" not in text and "@import" not in text
    own = class_name(index.classes, int(index.samples["label"][id]))
    assert page.alts[0] == f"query val {id}: {own}" and page.alts[1].startswith("neighbour 1 by fc7: ")
    assert page.alts[7].startswith("neighbour 1 by pixels: ")
    for alt, look in zip(page.alts[1:], page.looks[1:]):
        assert look == ("same" if alt.endswith(f": {own}") else "other")
    assert {"same", "other"} <= set(page.looks), "the test would not see a wrong frame"
    odd = tmp_path / "<b>&\".jpg"
    odd.write_bytes(index.read(id))
    assert asked(built, "--images", str(odd), "--out", str(tmp_path / "b.html"), "--no-pixels") == 0
    page = Page((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert page.titles[0] == odd.name and set(page.looks[1:]) == {""}


def test_words_on_the_sheet_neither_overlap_nor_leave_it() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    crop = np.zeros((9, 9, 3), np.uint8)
    words = ["American Staffordshire terrier", "W" * 45, "crab", "soft-coated wheaten terrier", "a$b$c_{", "computer keyboard",
             "?"]
    shown = [similar_sheet.Shown(crop, text, same, "train 1") for text, same in zip(words, [True, False, None, *[True] * 4])]
    rows = [similar_sheet.Row(shown[place], [("fc7", shown[1:]), ("pixels", shown[:6])]) for place in range(3)]
    figure = similar_sheet.draw(rows, "a long title of a sheet " * 12)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.findobj(Text) if text.get_text() and
             text.axes is None] + [axes.bbox for axes in figure.axes]
    assert len(boxes) > 2 * 3 * 6 + 39
    check_apart(boxes, figure.bbox)


def check_apart(boxes: list[Any], whole: Any) -> None:
    """No two boxes overlap, and all lie in the whole."""
    for place, box in enumerate(boxes):
        assert box.x0 >= whole.x0 and box.y0 >= whole.y0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
        for other in boxes[:place]:
            assert box.x0 >= other.x1 or other.x0 >= box.x1 or box.y0 >= other.y1 or other.y0 >= box.y1, (box, other)


def test_the_command_writes_a_png(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(built, "--count", "2", "--seed", "1", "--out", str(tmp_path / "new/a.PNG")) == 0
    with Image.open(tmp_path / "new/a.PNG") as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > 1000
    assert f"2 queries, 6 nearest of 75 images of split train, in {tmp_path}/new/a.PNG\n" in capsys.readouterr().out


def test_features_of_another_checkpoint_or_index_are_refused(run: Path, built: Path, tmp_path: Path, tiny_set: TinySet,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "a.png")]
    assert asked(built, *out, "--run", str(run)) == 2  # the last, not the best
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint (={run}/checkpoints/step-000000001) is not the one that the features of {built}")
    assert error.endswith("; give that one, or build the features again\n")
    assert asked(built, *out, "--run", str(run), "--which", "best") == 0
    copy = shutil.copytree(tiny_set.index, tmp_path / "index")
    from pipeline.index.writer import mark_excluded
    index = SampleIndex.load(copy)
    assert asked(built, *out, "--index", str(copy)) == 0, "a copy is the same"
    mark_excluded(index, {3: ("x", "damaged")})
    assert asked(built, *out, "--index", str(copy)) == 2
    assert f"index (={copy}) is not the one that the features of" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ([], "--out (=None) names the sheet, and --evaluate (=None) counts without one; give one of t"),
    (["--out", "a.png", "--evaluate", "3"], "names the sheet, and --evaluate (=3) counts without one"),
    (["--out", "a.jpg"], "--out (=a.jpg) must end in .png or .html; correct it"),
    (["--out", "a.png", "--count", "0"], "queries (=0) must lie in 1..40; larger sheets cannot be read, --evaluate draws none"),
    (["--out", "a.png", "--count", "41"], "queries (=41) must lie in 1..40"),
    (["--evaluate", "25"], "images (=25) must lie in 1..24, the images of split val; ask for that many"),
    (["--evaluate", "0"], "images (=0) must lie in 1..24"),
    (["--evaluate", "2", "--neighbours", "0"], "neighbours (=0) must lie in 1..74"),
    (["--evaluate", "2", "--split", "no"], "split (=no) is not in the index"),
    (["--out", "a.png", "--ids", "5", "5"], "id (=5) is given twice; give it once"),
    (["--out", "a.png", "--ids", "5000"], "id (=5000) is not in the index"),
    (["--out", "a.png", "--images", "nowhere.jpg"], "image (=nowhere.jpg) does not exist; give a JPEG or PNG file"),
    (["--out", "a.png", "--checkpoint", "nowhere"], "checkpoint (=nowhere) does not exist; give a run folder or"),
    (["--out", "a.png", "--which", "best"], "--which (=best) chooses among a run's checkpoints; leave it out, or")])
def test_bad_arguments_are_one_line_and_exit_2(built: Path, words: list[str], message: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert asked(built, *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    from tests.helpers.small_set import photographs, write_set
    other = write_set(tmp_path, photographs(3), photographs(3))
    with pytest.raises(ValueError, match=r"has other classes, or another order of them, than the one the network was"):
        with load_trained(resolve(run), index=other.path):
            pass


def test_words_of_classes(tiny_set: TinySet) -> None:
    from pipeline.index.sample_index import ClassInfo
    classes = [ClassInfo("n1", "great cat, Felis magna"), ClassInfo("n2", "")]
    assert [class_name(classes, label) for label in (-1, 0, 1, 2)] == ["?", "great cat", "n2", "class 2"]
