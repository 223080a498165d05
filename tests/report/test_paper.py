"""Which experiment of the paper a recipe is, and which data set an index: by what they are, not by their names."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from tests.helpers.reports import recipe
from train.report import paper


@pytest.mark.parametrize("name, key, full_size", [
    ("alexnet_ilsvrc2010", "full", True), ("alexnet_ilsvrc2012", "full", True), ("tiny100", "full", False),
    ("demo", "full", False)])
def test_recipes_are_recognised(name: str, key: str, full_size: bool) -> None:
    assert paper.experiment(recipe(name)) == (key, "the network")
    assert paper.paper_size(recipe(name), key) is full_size


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    config = recipe("alexnet_ilsvrc2012")
    change(config)
    return config


CONV6 = {"kernels": 256, "px": 3, "pad": 1, "sees": "both", "std": 0.03, "bias": 1}


def layers(**new: dict[str, Any] | None) -> Callable[[dict[str, Any]], object]:
    def change(config: dict[str, Any]) -> None:
        table = config["model"]["layers"]
        for name, keys in new.items():
            if keys is None:
                del table[name]
            else:
                table[name] = {**table.get(name, CONV6), **keys}
    return change


@pytest.mark.parametrize("key, change", [
    ("no_lrn", lambda config: config["model"].update(lrn=None)), ("no_lrn", layers(conv1={"lrn": "none"}, conv2={"lrn": "none"})),
    ("plain_pool", lambda config: config["model"].update(pool={"px": 2, "stride": 2})),
    ("no_lighting", lambda config: config["data"].update(lighting=0.0)),
    ("no_mirror", lambda config: config["data"].update(mirror=False)),
    ("no_dropout", lambda config: config["model"].update(dropout=0.0)),
    ("tanh", lambda config: config["model"].update(activation="tanh")),
    ("apart", layers(conv3={"sees": "own"}, fc6={"sees": "own", "neurons": 8192}, fc7={"sees": "own"})),
    ("no_layer", layers(conv4=None)), ("no_layer", layers(conv5=None, conv4={"pool": True})), ("no_full", layers(fc7=None)),
    ("full", layers(conv1={"lrn": "before"})), ("six_conv", layers(conv6={})), ("one_tower", lambda config: (
        config["model"].update(towers=1), layers(conv1={"kernels": 48}, conv2={"kernels": 128}, conv3={"kernels": 192},
                                                 conv4={"kernels": 192})(config)))])
def test_one_change_is_recognised_at_its_size(key: str, change: Callable[[dict[str, Any]], object]) -> None:
    config = changed(change)
    assert paper.experiment(config)[0] == key and paper.paper_size(config, key)


@pytest.mark.parametrize("change", [
    lambda config: (config["model"].update(lrn=None), config["data"].update(lighting=0.0)),
    lambda config: config["model"].update(pool={"px": 3, "stride": 3, "more": 1}) or config["model"].update(activation="tanh"),
    lambda config: config["model"].update(pool={"px": 5, "stride": 2}), layers(conv3=None, conv4=None), layers(conv1=None),
    lambda config: config["model"]["lrn"].update(k=1.0), lambda config: config["model"]["lrn"].update(alpha=1e-3),
    layers(conv3={"sees": "own"}), layers(conv2={"px": 3}), layers(conv4={"lrn": "after"}),
    lambda config: config.update(init_from={"checkpoint": "runs/other"}), lambda config: config["model"].pop("layers")])
def test_other_changes_are_none_of_the_papers(change: Callable[[dict[str, Any]], object]) -> None:
    assert paper.experiment(changed(change))[0] == ""


def test_the_fine_tuned_six_convolutions_are_told_from_the_plain_ones() -> None:
    config = changed(layers(conv6={}))
    config["init_from"] = {"checkpoint": "runs/fall2011"}
    assert paper.experiment(config)[0] == "six_conv_fine_tuned" and paper.paper_size(config, "six_conv_fine_tuned")
    for part, key, value in (("model", "dropout", 0.4), ("data", "lighting", 0.5), ("data", "square_px", 272),
                             ("data", "region", "full")):
        config = changed(lambda config: config[part].update({key: value}))
        assert paper.experiment(config)[0] == "full" and not paper.paper_size(config, "full"), key
    assert not paper.paper_size(changed(lambda config: config["model"]["layers"]["fc6"].update(neurons=1024)), "full")


def test_data_sets_are_known_by_their_counts() -> None:
    assert paper.data_set(1000, (1_281_167, 1_281_167), 50_000) == "ilsvrc2012"
    assert paper.data_set(1000, (1_281_153, 1_281_280), 50_000) == "ilsvrc2012"  # from the steps of one epoch
    assert paper.data_set(1000, (1_280_900, 1_280_900), 50_000) == "ilsvrc2012"  # some unreadable ones are excluded
    assert paper.data_set(1000, (1_261_406, 1_261_406), 150_000) == "ilsvrc2010"
    assert paper.data_set(1000, (1_261_406, 1_261_406), 50_000) == ""  # validated, not tested
    assert paper.data_set(10, (50_000, 50_000), 10_000) == "cifar10"
    for other in ((100, (50_000, 50_000), 5_000), (1000, (1_270_000, 1_270_000), 50_000),
                  (1000, (1_281_168, 1_281_168), 50_000), (1000, None, 50_000),
                  (1000, (1_281_167, 1_281_167), None), (100, (1_281_167, 1_281_167), 50_000), (None, None, None)):
        assert paper.data_set(*other) == "", other  # type: ignore[arg-type]
