"""The sheet of most probable labels (paper figure 4, left): whose probabilities, which images, words that can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from pipeline.index.sample_index import SampleIndex
from tests.conftest import TinySet
from tests.helpers.figures import check_apart, show
from tests.helpers.trained_run import write_run
from tools.show import top5
from train.checkpoint.resolve import class_name, load_trained, resolve


@pytest.fixture(scope="module")
def run(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("top5"), tiny_set, (0.5, None))


@pytest.mark.parametrize("views", [1, 10])
def test_probabilities_are_those_of_a_test(run: Path, tiny_set: TinySet, views: int) -> None:
    from train import build
    from train.evaluate.predict import evaluate

    with load_trained(resolve(run)) as trained:
        ids = trained.index.ids("val")
        found = top5.probabilities(trained, "val", ids, views)
        with trained.loader(trained.index, "val") as loader:
            score = evaluate(trained.network, loader, views, build.autocast(trained.config, trained.topology))
        some = top5.probabilities(trained, "val", ids[[7, 3]], views)
    assert score is not None and found.shape == (24, 6) and np.allclose(found.sum(1), 1)
    labels = SampleIndex.load(tiny_set.index).samples["label"][ids]
    assert (found.argmax(1) != labels).sum() == score.top1_errors and 0 < score.top1_errors < 24
    assert -np.log(found[np.arange(24), labels]).mean() == pytest.approx(score.loss, rel=1e-5)
    np.testing.assert_allclose(some, found[[7, 3]], rtol=1e-4, atol=1e-7)  # a batch of another size sums in another order


WORDS = ["American Staffordshire terrier", "W" * 60, "crab", "soft-coated wheaten terrier, wet", "a$b$c_{", "?", "tab"]


def sheet() -> Figure:
    """Of seven images: the right label first, third, seventh, unknown …"""
    found = np.tile(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]), (7, 1))
    labels = np.array([0, 2, 6, -1, 1, 4, 3])
    return top5.draw(np.zeros((7, 9, 9, 3), np.uint8), found, labels, WORDS, "a long title of a sheet " * 12).figure


def test_words_neither_overlap_nor_leave_the_sheet() -> None:
    figure = sheet()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.axes is None]
    texts += [text for axes in figure.axes for text in axes.texts]
    pictures = [axes.bbox for axes in figure.axes if axes.images]
    assert len(texts) >= 1 + 7 + 7 * 10 and len(pictures) == 7
    check_apart([text.get_window_extent(canvas.get_renderer()) for text in texts] + pictures, figure.bbox)


def test_bars_are_the_most_probable_and_the_right_one_has_another_colour() -> None:
    figure = sheet()
    bars = [axes for axes in figure.axes if axes.texts]
    below = [text.get_text() for text in figure.texts]
    for place, right in enumerate([0, 2, None, None, 1, 4, 3]):
        drawn = [patch for patch in bars[place].patches
                 if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) != top5.TRACK]
        assert [patch.get_width() for patch in drawn] == [0.4, 0.25, 0.15, 0.1, 0.06]
        colours = [to_hex(patch.get_facecolor()) for patch in drawn]
        assert [row for row, colour in enumerate(colours) if colour == top5.RIGHT] == ([] if right is None else [right])
        assert [text.get_text() for text in bars[place].texts[::2]] == WORDS[:5]
        assert [text.get_text() for text in bars[place].texts[1::2]] == ["40%", "25%", "15%", "10%", "6%"]
    assert {"tab (rank 7)", "label unknown", "crab"} <= set(below)


def test_the_command_writes_a_png(run: Path, tiny_set: TinySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/top5.png"
    words = ["--run", str(run), "--which", "best", "--out", str(out)]
    assert show("top5", *words, "--count", "3", "--seed", "2") == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.size[0] > 900
    said = capsys.readouterr().out
    assert said.startswith(f"3 images in {out}; the right label is the first for ")
    first = out.read_bytes()
    assert show("top5", *words, "--count", "3", "--seed", "2") == 0 and out.read_bytes() == first, "a seed gives a sheet"
    assert show("top5", *words, "--count", "3", "--seed", "3") == 0 and out.read_bytes() != first
    index = SampleIndex.load(tiny_set.index)
    with load_trained(resolve(run, "best")) as trained:
        ids = index.ids("val")[[1, 0]]
        found = top5.probabilities(trained, "val", ids, 1)
    capsys.readouterr()
    assert show("top5", *words, "--ids", *ids, "--views", "1") == 0
    right = (found.argmax(1) == index.samples["label"][ids]).sum()
    assert f"2 images in {out}; the right label is the first for {right}, in the top five for " in capsys.readouterr().out
    assert class_name(index.classes, 0) in {"red ball", "blue ball", "red box", "blue box"}


@pytest.mark.parametrize("words, message", [
    (["--count", "0"], "images (=0) must lie in 1..60; larger sheets cannot be read"),
    (["--count", "61"], "images (=61) must lie in 1..60"),
    (["--count", "25"], "images (=25) must lie in 1..24, the images of split val; ask for that many"),
    (["--ids", "5000"], "id (=5000) is not in the index"),
    (["--split", "no"], "split (=no) is not in the index")])
def test_bad_arguments_are_one_line_and_exit_2(run: Path, words: list[str], message: str, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert show("top5", "--run", run, "--out", tmp_path / "a.png", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_missing_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show("top5", "--run", tmp_path / "no", "--out", tmp_path / "a.png") == 2
    assert "no) does not exist; give a run folder, such as" in capsys.readouterr().err
