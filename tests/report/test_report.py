"""What a report says: what counts as one result, what is held against the paper, what a change costs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.reports import Page, checked, recipe, report, small, write_run
from train.report import paper, plots
from train.report.compare import Difference, Ensemble, ablations, averages, difference, epochs_to_error, relu_and_tanh
from train.report.groups import group, index_name, stat
from train.report.runs import Run, read_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return small(tmp_path_factory.mktemp("recipe"))


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path, base: dict[str, Any]) -> None:
    other = copy.deepcopy(base)
    other["optimizer"]["lr"] = 0.02
    faster = copy.deepcopy(base)
    faster["machine"]["threads"] = 7
    runs = [write_run(tmp_path / "full-s1", base, 1, test=0.40), write_run(tmp_path / "full-s2", faster, 2, test=0.42),
            write_run(tmp_path / "full-s3", base, 3, test=0.47), write_run(tmp_path / "other", other, 1)]
    page = checked(report(tmp_path / "r.html", *runs)[0])
    second, first = page.rows("Results on nowhere (6 classes, about 7")  # the best first
    assert page.rows("Differences on nowhere")[1:] == [{"key": "optimizer.lr", "other": "0.02", "full": "0.01"}]
    # Mean 43, deviations −3, −1, 4: sd = sqrt(26 / 2).
    assert (first["recipe"], first["seeds"], first["epochs"]) == ("full", "3", "3")
    assert first["test err@1, %"] == f"43.00 ± {math.sqrt(13):.2f}" == "43.00 ± 3.61"
    assert first["test"] == "val, 10 crops" and "test err@5, %" not in first, "five of six say nothing"
    assert (first["validation err@1, %"], first["images/s"]) == ("50.00 ± 0.00", "100 ± 0")
    assert (first["data wait, % of time"], first["training, minutes"]) == ("4.0 ± 0.0", "3.0 ± 0.0")
    assert (second["recipe"], second["seeds"], second["test err@1, %"]) == ("other", "1", "40.00")


def test_other_images_precision_and_weights_are_other_results(tmp_path: Path, base: dict[str, Any]) -> None:
    precise, tuned = copy.deepcopy(base), copy.deepcopy(base)
    precise["machine"]["precision"] = "bf16"
    tuned["init_from"] = {"checkpoint": "runs/x", "renew": []}
    runs = [write_run(tmp_path / "a", base), write_run(tmp_path / "b", base, 2, index="j" * 64),
            write_run(tmp_path / "c", precise, 3), write_run(tmp_path / "d", tuned, 4)]
    assert [len(one.runs) for one in group([read_run(run) for run in runs])] == [1, 1, 1, 1]


def test_a_seed_twice_is_counted_once_and_those_behind_are_not_averaged(tmp_path: Path, base: dict[str, Any]) -> None:
    runs = [write_run(tmp_path / "a-1", base, 1, test=0.4), write_run(tmp_path / "a-1-again", base, 1, errors=(0.8,), test=None),
            write_run(tmp_path / "a-2", base, 2, test=0.5), write_run(tmp_path / "a-3", base, 3, errors=(0.9,), test=None)]
    page = checked(report(tmp_path / "r.html", *runs)[0])
    row, = page.rows("Results on nowhere (6 classes, about 7")
    assert (row["seeds"], row["epochs"], row["test err@1, %"]) == ("2 of 3", "1–3 of 3", "45.00 ± 7.07")
    assert row["validation err@1, %"] == "50.00 ± 0.00"
    assert "a-1-again (seed 1): another run of this seed is counted in its place" in page.text
    assert "a-3 (seed 3): not finished: 1 of 3 epochs" in page.text


def test_runs_no_better_than_guessing_are_flagged(tmp_path: Path, base: dict[str, Any]) -> None:
    stuck = copy.deepcopy(base)
    stuck["optimizer"]["lr"] = 1e-9
    page = checked(report(tmp_path / "r.html", write_run(tmp_path / "good", base),
                          write_run(tmp_path / "stuck", stuck, errors=(0.83,) * 3, test=0.80))[0])
    good, bad = page.rows("Results on nowhere")
    assert good["recipe"] == "good" and bad["recipe"] == "stuck at chance" and "stuck (seed 1): at chance: no better" in page.text
    for words in ("40.00% top-1 error (10/24), 95% interval 24.47% to 61.17%, on val, 10 crops",
                  "3 epochs, the best of 2 recipes"):
        assert words in page.text
    packed = write_run(tmp_path / "packed", stuck, errors=(0.83,) * 3, test=0.83, index="p" * 64)  # other images of the same name
    page = checked(report(tmp_path / "r.html", tmp_path / "good", tmp_path / "stuck", packed)[0])
    assert page.text.count("at chance: no better") == 1 and "stuck (seed 1), packed (seed 1): at chance: no better" in page.text
    assert "packed, 3 epochs; no better" in page.text
    titles = [title for title in page.tables if title.startswith("Results on nowhere")]
    assert [title.rpartition(", ")[2] for title in titles] == ["i" * 8, "p" * 8]


def test_what_departs_from_the_papers_network_is_said() -> None:
    tiny, own = (paper.other_sizes(recipe(name), "full") for name in ("tiny100", "alexnet_ilsvrc2012"))
    assert own == "" and tiny.startswith("crops of 99 from 112 px (227 from 256), dropout 0.4 (0.5), conv1 48, conv2 128, ")
    assert tiny.endswith("fc7 1024 kernels or neurons (96, 256, 384, 384, 256, 4096, 4096), initial weights or biases")


def test_a_charts_places_and_ticks() -> None:
    chart, = plots.chart("loss", [plots.Series("a", ((1, 4.0), (2, 1.0), (5, 0.0))), plots.Series("b", ((2, 3.0),)),
                                  plots.Series("none", ())])
    assert [text for _, text in chart.y_ticks] == list("01234") and [text for _, text in chart.x_ticks] == list("12345")
    assert chart.line(chart.series[0]).split()[0] == f"{plots.LEFT:.1f},{plots.TOP:.1f}"
    assert chart.bands[1][3] == "epoch 2\na: 1\nb: 3"
    assert sum(width for _, _, width, _ in chart.bands) == pytest.approx(plots.WIDTH)
    rates, = plots.chart("rate", [plots.Series("lr", ((1, 1e-2), (2, 5e-4)))], log=True)
    assert [text for _, text in rates.y_ticks] == ["0.0001", "0.001", "0.01"] and rates.y(1e-2) == plots.TOP
    assert plots.chart("nothing", [plots.Series("none", ())]) == []
    assert [plots.nice(span, 5) for span in (1, 4, 5, 90, 0.03)] == pytest.approx([0.2, 1, 1, 20, 0.01])


def test_stat_and_difference_against_scipy() -> None:
    from scipy.stats import ttest_ind

    one, other = [0.41, 0.44, 0.42], [0.40, 0.38, 0.405, 0.39]
    mine = difference(one, [*other, None])
    limits = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert mine is not None and mine.half is not None
    assert (mine.mean - mine.half, mine.mean + mine.half) == pytest.approx((limits.low, limits.high), abs=1e-9)
    single = difference([0.5], [0.4, 0.3])
    assert single is not None and single.mean == pytest.approx(0.15) and single.half is None
    assert difference([None], other) is None and stat([None]) is None
    same = difference([0.5, 0.5], [0.25, 0.25])
    assert same is not None and (same.mean, same.half) == (0.25, 0.0)


@pytest.mark.parametrize("batch, train", [(8, 72), (128, 1_281_167), (128, 50_000), (7, 72), (256, 100)])
def test_training_images_are_counted_from_the_steps(tmp_path: Path, base: dict[str, Any], batch: int, train: int) -> None:
    config = copy.deepcopy(base)
    config["train"]["batch"] = batch
    run = read_run(write_run(tmp_path / "run", config, errors=(0.9,) * 20, train=train))
    assert run.train_images is not None and run.train_images[0] <= train <= run.train_images[1]
    assert run.train_images[1] - run.train_images[0] < batch


def ours(page: Page) -> list[dict[str, str]]:
    """Rows of the paper's table, which are there where something of ours stands in them."""
    return page.rows("The paper’s results beside ours") if "The paper’s results beside ours" in page.tables else []


def test_ours_stands_beside_the_paper_only_when_it_is_the_same(tmp_path: Path) -> None:
    config = recipe("alexnet_ilsvrc2012")
    imagenet: dict[str, Any] = {"images": 50_000, "train": 1_281_167, "errors": (0.6,) * 90}
    narrow, tiny = copy.deepcopy(config), recipe("tiny100")
    narrow["model"]["layers"]["fc6"]["neurons"] = 2048
    runs = {"tiny": write_run(tmp_path / "tiny", tiny, images=5000, train=50_000, errors=(0.5,) * 50),
            "full size on other images": write_run(tmp_path / "full_tiny", config, images=5000, train=50_000, index="t" * 64),
            "a narrower network": write_run(tmp_path / "narrow", narrow, 1, **imagenet)}
    for what, run in runs.items():
        assert ours(checked(report(tmp_path / "r.html", run)[0])) == [], what
    normalised = copy.deepcopy(config)
    normalised["model"]["lrn"] = None
    more = [write_run(tmp_path / "net-s1", config, 1, test=0.41, **imagenet),
            write_run(tmp_path / "net-s2", config, 2, test=0.40, **imagenet),
            write_run(tmp_path / "no_lrn", normalised, 1, test=0.42, views=1, **imagenet)]
    first, second = ours(checked(report(tmp_path / "r.html", *runs.values(), *more)[0]))
    assert (first["experiment"], first["data"], first["paper top-1 error, %"]) == ("the network", "ILSVRC-2012 val", "40.66")
    assert first["our top-1 error, %"] == "40.50 ± 0.71" and first["our runs"] == "net: 2 seeds"
    assert second["experiment"] == "no response normalisation"
    assert second["our top-1 error, %"] == "–" and second["our runs"] == "no_lrn: not tested with ten crops"


def test_an_unfinished_run_shows_how_far_it_is_and_no_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "net", recipe("alexnet_ilsvrc2012"), errors=(0.6,) * 13, test=None, images=50_000, train=1_281_167)
    row, = ours(checked(report(tmp_path / "r.html", run)[0]))
    assert row["our runs"] == "net: not finished: 13 of 90 epochs" and row["our top-1 error, %"] == "–"


def test_changes_stand_beside_the_papers_with_what_else_differs(tmp_path: Path) -> None:
    tiny = recipe("tiny100")
    normalised, shallow = copy.deepcopy(tiny), copy.deepcopy(tiny)
    normalised["model"]["lrn"] = None
    del shallow["model"]["layers"]["conv4"]
    shallow["train"]["epochs"] = 40
    runs = []
    for seed, error in ((1, 0.50), (2, 0.52)):
        runs += [write_run(tmp_path / f"full-s{seed}", tiny, seed, test=error, images=5000, train=50_000),
                 write_run(tmp_path / f"no_lrn-s{seed}", normalised, seed, test=error + 0.03, images=5000, train=50_000)]
    runs += [write_run(tmp_path / "shallow", shallow, 1, test=0.6, images=5000, train=50_000),
             write_run(tmp_path / "elsewhere", normalised, 1, test=0.1, images=5000, train=50_000, index="x" * 64)]
    page = checked(report(tmp_path / "r.html", *runs)[0])
    rows = {row["change"]: row for row in page.rows("Changes to the network")}
    assert rows["the network (full)"]["our top-1 error, %"] == "51.00 ± 1.41"
    lrn = rows["no response normalisation (no_lrn: no LRN)"]
    # Two seeds each with sd √2: standard error √2, two degrees of freedom: 4.303 √2 = 6.08.
    assert (lrn["our top-1, points"], lrn["paper top-1, points"], lrn["our seeds"]) == ("+3.00 ± 6.08", "+1.37", "2")
    assert "also differs" not in lrn["source of the paper’s figure"]
    layer = rows["a middle layer removed (shallow: without conv4)"]
    assert (layer["our top-1, points"], layer["paper top-1, points"]) == ("+9.00", "about +2")
    assert "also differs: train.epochs: 50 -> 40" in layer["source of the paper’s figure"]
    assert "pooling that does not overlap" not in rows, "not run"
    assert "Ours are on tiny100 (100 classes, about 49,99" in page.text and "other data and another size" in page.text
    found = ablations(group([read_run(run) for run in runs]))
    assert {one.group.name for one in found} == {"no_lrn", "shallow"}, "those on other images have no full network"


def test_results_of_one_name_are_told_apart(tmp_path: Path) -> None:
    tiny = recipe("tiny100")
    longer, longest, other = (copy.deepcopy(tiny) for _ in range(3))
    longer["train"]["epochs"], longest["train"]["epochs"], other["model"]["lrn"] = 99, 100, None
    folders = [("a/study/full-s1", tiny, 1), ("b/study/full-s1", longer, 1), ("c/full-s1", longest, 1), ("c/no_lrn", other, 1)]
    runs = [read_run(write_run(tmp_path / name, config, seed, images=5000, train=50_000)) for name, config, seed in folders]
    assert [one.name for one in group(runs)] == ["a/study/full-s1", "b/study/full-s1", "c/full-s1", "no_lrn"]
    page = checked(report(tmp_path / "r.html", *(tmp_path / name for name, _, _ in folders))[0])
    row, = (row for row in page.rows("Changes to the network") if "no_lrn" in row["change"])
    assert "against" not in row["source of the paper’s figure"], "it is held against one only, the nearest"
    halves = [Run(tmp_path / name, name, {**config, "train": {**config["train"], "seed": seed}})
              for name, config, seed in (("x-s1", tiny, 1), ("x-s2", tiny, 2), ("x-s3", longer, 3), ("x-s4", longer, 4))]
    assert [one.name for one in group(halves)] == ["x-s1", "x-s3"]


def test_an_average_is_the_papers_with_its_networks_on_its_images(tmp_path: Path) -> None:
    config = recipe("alexnet_ilsvrc2012")
    six = copy.deepcopy(config)
    six["model"]["layers"]["conv6"] = {"kernels": 256, "px": 3, "pad": 1, "sees": "both", "std": 0.03, "bias": 1}
    six["init_from"] = {"checkpoint": "runs/fall2011"}
    one, tuned = group([read_run(write_run(tmp_path / name, values, errors=(0.6,) * 90, images=50_000, train=1_281_167))
                        for name, values in (("net", config), ("six", six))])
    five, seven = (next(row for row in paper.ROWS if row.key == key) for key in (paper.FIVE, paper.SEVEN))

    def ensemble(images: int, members: int, **more: Any) -> Ensemble:
        return Ensemble(one, members, images, 0.3, 0.1, Difference(-0.01, None), Difference(-0.01, None), **more)

    same, both = ensemble(50_000, 5), ensemble(50_000, 7, tuned=tuned, of_tuned=2)
    others = [ensemble(20_000, 5), ensemble(50_000, 4), ensemble(50_000, 7), ensemble(50_000, 7, tuned=tuned, of_tuned=3)]
    assert averages(five, [*others, same, both]) == [same] and averages(seven, [*others, same, both]) == [both]
    narrow = copy.deepcopy(six)
    narrow["model"]["layers"]["conv6"]["kernels"] = 128
    other, = group([Run(tmp_path / "six", "six", narrow)])
    assert averages(seven, [ensemble(50_000, 7, tuned=other, of_tuned=2)]) == []


def test_what_a_change_does_not_ask_for_is_named() -> None:
    config = recipe("tiny100")
    wide = copy.deepcopy(config)
    wide["model"]["lrn"] = None
    wide["model"]["layers"]["fc6"]["neurons"] = 512
    wide["machine"]["precision"] = "bf16"
    found = ablations(group([Run(Path(name), name, values) for name, values in (("full", config), ("wide", wide))]))
    assert found[0].also == ("model.layers.fc6.neurons: 1024 -> 512", "machine.precision: fp32 -> bf16")


def test_figure_1_compares_the_quickest_of_each_activation(tmp_path: Path, base: dict[str, Any]) -> None:
    config = copy.deepcopy(base)
    config["model"]["classes"] = 10
    cifar: dict[str, Any] = {"images": 10_000, "train": 50_000}

    def made(name: str, activation: str, lr: float, errors: tuple[float, ...]) -> Path:
        values = copy.deepcopy(config)
        values["model"]["activation"], values["optimizer"]["lr"] = activation, lr
        return write_run(tmp_path / name, values, errors=errors, test=None, **cifar)

    # Training errors are 0.1 more: 0.45, 0.30, 0.20 fall below 0.25 half-way through the third epoch.
    runs = [made("relu", "relu", 0.1, (0.35, 0.2, 0.1)), made("slow", "relu", 0.01, (0.4, 0.4, 0.4)),
            made("tanh", "tanh", 0.1, (0.4,) * 9 + (0.14,)), made("worse", "tanh", 0.5, (0.4,) * 12)]
    pair = relu_and_tanh(group([read_run(run) for run in runs]))
    assert pair is not None and [one.name for one in pair] == ["relu", "tanh"]
    assert (epochs := epochs_to_error(pair[0])) is not None and epochs.mean == pytest.approx(2.5)
    page = report(tmp_path / "r.html", *runs)[0]
    assert 'aria-label="training error, ReLU against tanh (figure 1), % by epoch"' in page
    row, = checked(page).rows("ReLU against tanh")
    assert (row["paper"], row["ReLU, epochs"], row["our runs"]) == ("about 6", "2.5", "relu, tanh")
    assert float(row["ours"]) == pytest.approx((9 + 0.25 / 0.26) / 2.5, abs=0.05)
    row, = checked(report(tmp_path / "r.html", runs[1], runs[3])[0]).rows("ReLU against tanh")
    assert (row["ours"], row["ReLU, epochs"]) == ("–", "not reached")
    assert relu_and_tanh(group([read_run(runs[0])])) is None
    stuck = copy.deepcopy(config)
    stuck["model"]["activation"], stuck["optimizer"]["lr"] = "relu", 0.1
    runs.append(write_run(tmp_path / "relu-2", stuck, 2, errors=(0.9,) * 3, test=None, **cifar))
    row, = checked(report(tmp_path / "r.html", runs[0], runs[2], runs[4])[0]).rows("ReLU against tanh")
    assert (row["ours"], row["ReLU, epochs"]) == ("–", "2.5 (1 of 2 runs)"), "a mean over those that got there is too small"


@pytest.mark.parametrize(("path", "name"), [("a/photos.index/hold-out", "photos.index (held out)"), ("hold-out", "hold-out"),
                                            ("/b/x.index/hold-out-0a1b2c3d/", "x.index (held out)"), ("idx/", "idx"), ("", "")])
def test_name_of_a_divided_index(path: str, name: str) -> None:
    assert index_name(path) == name
