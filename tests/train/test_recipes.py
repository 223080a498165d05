"""Every recipe: its network, its rates and its data, by hand, against the row of the paper it stands for; one step of it."""
import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model.alexnet import parameter_count, paper, shapes
from model.config import LrnConfig, PoolConfig
from pipeline.compute_stats import compute
from tests.helpers.small_set import photographs, write_set
from tools.study import read_study
from train import build
from train.config import Config
from train.optimizer import Schedule
from train.parallel.topology import Topology
from train.recipe import load, parse
from train.step import TrainStep

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "train" / "recipes"
SMALL = FOLDER / "small.yaml"  # takes its classes from an index, so it cannot be read without one; see test_own_folder.py
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path != SMALL)

# Weights and biases of the layers of paper §3.5, layer by layer.
CONV1, CONV2, CONV3, CONV4, CONV5 = 96 * 363 + 96, 256 * 1200 + 256, 384 * 2304 + 384, 384 * 1728 + 384, 256 * 1728 + 256
FC6, FC7, FC8 = 4096 * 9216 + 4096, 4096 * 4096 + 4096, 1000 * 4096 + 1000
PAPER = CONV1 + CONV2 + CONV3 + CONV4 + CONV5 + FC6 + FC7 + FC8
CONV6 = 256 * 2304 + 256
# tiny100.yaml: 48, 128, 192, 192, 128 kernels, 2 × 2 maps before fc6.
TINY = {"conv1": 48 * 363 + 48, "conv2": 128 * 600 + 128, "conv3": 192 * 1152 + 192, "conv4": 192 * 864 + 192,
        "conv5": 128 * 864 + 128, "fc6": 1024 * 512 + 1024, "fc7": 1024 * 1024 + 1024, "fc8": 100 * 1024 + 100}
TINY_ALL = sum(TINY.values())

PARAMETERS = {
    "alexnet_ilsvrc2010": PAPER, "alexnet_ilsvrc2012": PAPER,
    "ilsvrc2010_as_run": PAPER, "ilsvrc2012_as_run": PAPER,
    # One tower: 48, 128, 192, 192 and 256 kernels, fc6 and fc7 whole (release run 145-half).
    "ilsvrc2010_one_tower": 48 * 363 + 48 + 128 * 1200 + 128 + 192 * 1152 + 192 + 192 * 1728 + 192 + CONV5 + FC6 + FC7 + FC8,
    "ilsvrc2012_no_overlap": PAPER, "ilsvrc2012_no_lrn": PAPER, "ilsvrc2012_no_lighting": PAPER, "ilsvrc2012_no_dropout": PAPER,
    # conv3 sees 128 maps instead of 256; fc6 is 4,096 neurons of 4,608 features twice, fc7 2,048 of 4,096 twice.
    "ilsvrc2012_softmax_only": PAPER - 384 * 1152 + 4096,
    "ilsvrc2012_without_conv3": PAPER - CONV3 - 384 * (1728 - 1152), "ilsvrc2012_without_conv4": PAPER - CONV4,
    "ilsvrc2012_without_conv5": PAPER - CONV5 + 4096 * (384 - 256) * 36, "ilsvrc2012_without_fc7": PAPER - FC7,
    "ilsvrc2012_six_conv": PAPER + CONV6, "ilsvrc2012_finetune": PAPER + CONV6,
    "fall2009": PAPER + CONV6 - FC8 + 2048 * 4096 + 2048 + 10_184 * 2048 + 10_184,
    "fall2011": PAPER + CONV6 - FC8 + 2048 * 4096 + 2048 + 21_841 * 2048 + 21_841,
    "tiny100": TINY_ALL, "tiny100_no_lrn": TINY_ALL, "tiny100_no_overlap": TINY_ALL, "tiny100_no_lighting": TINY_ALL,
    "tiny100_no_dropout": TINY_ALL, "tiny100_tanh": TINY_ALL,
    "tiny100_one_tower": 24 * 363 + 24 + 64 * 600 + 64 + 96 * 576 + 96 + 96 * 864 + 96 + sum(
        TINY[name] for name in ("conv5", "fc6", "fc7", "fc8")),
    "tiny100_no_exchange": TINY_ALL - 192 * 576 + 1024,
    "tiny100_without_conv3": TINY_ALL - TINY["conv3"] - 192 * (864 - 576),
    "tiny100_full_size": PAPER - 900 * 4097,
    "tiny50_first": TINY_ALL - 50 * 1025, "tiny50_second": TINY_ALL - 50 * 1025, "tiny50_finetune": TINY_ALL - 50 * 1025,
    "figure1_relu": 32 * 75 + 32 + 32 * 800 + 32 + 64 * 800 + 64 + 10 * 576 + 10,
    "figure1_tanh": 32 * 75 + 32 + 32 * 800 + 32 + 64 * 800 + 64 + 10 * 576 + 10,
    "demo": 48 * 363 + 48 + 64 * 600 + 64 + 96 * 576 + 96 + 96 * 432 + 96 + 64 * 432 + 64 + 256 * 65 + 256 * 257 + 10 * 257,
}


@functools.cache
def recipe(name: str) -> Config:
    return load(FOLDER / f"{name}.yaml")


def changed(name: str, base: str) -> dict[str, Any]:
    """What differs between two recipes, flat: key → (base, this one)."""
    def flat(values: Any, key: str = "") -> dict[str, Any]:
        if isinstance(values, dict) and values:
            return {k: v for inner, value in values.items() for k, v in flat(value, f"{key}.{inner}".strip(".")).items()}
        return {key: values}
    ours, theirs = flat(recipe(name).as_dict()), flat(recipe(base).as_dict())
    keys = ours.keys() | theirs.keys()
    return {key: (theirs.get(key), ours.get(key)) for key in keys if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_parameters(path: Path) -> None:
    assert parameter_count(recipe(path.stem).model) == PARAMETERS[path.stem]
    assert PARAMETERS["alexnet_ilsvrc2012"] == 60_965_224


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_says_how_it_is_run(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"python -m train.main --config train/recipes/{path.name}" in header
    assert all(len(line) <= 130 for line in path.read_text(encoding="utf-8").splitlines())
    assert "paper §" in header and "ata" in header and "ime" in header
    if not path.stem.endswith("tanh"):
        assert "Data" in header and ("Expected" in header or "Measured" in header) and "ime:" in header


def test_the_papers_network_and_update_rule() -> None:
    for name, index, test in (("alexnet_ilsvrc2010", "ilsvrc2010", "test"), ("alexnet_ilsvrc2012", "ilsvrc2012", "val")):
        config = recipe(name)
        assert config.model == paper()
        rule = config.optimizer
        assert (rule.lr, rule.momentum, rule.weight_decay, rule.bias_lr_factor) == (0.01, 0.9, 0.0005, 2)
        assert config.schedule.plateau is not None and (config.schedule.plateau.factor, config.schedule.plateau.drops) == (0.1, 3)
        assert (config.train.epochs, config.train.batch, config.train.test_views) == (90, 128, 10)
        assert (config.data.square_px, config.data.crop_px, config.data.mirror, config.data.lighting) == (256, 227, True, 0.1)
        assert (config.data.index, config.data.test_split, config.data.mean) == (f"indexes/{index}", test, "image")
        assert (config.machine.precision, config.machine.channels_last) == ("auto", True)


def test_as_run() -> None:
    for name in ("ilsvrc2010_as_run", "ilsvrc2012_as_run"):
        config = recipe(name)
        schedule = Schedule(config.schedule, config.optimizer, config.train.batch)
        rates = [(schedule.lr(0, epoch), schedule.layer_rates(epoch).get("conv1", 1.0)) for epoch in range(93)]
        assert config.train.epochs == 93
        assert rates[:23] == [(0.01, 1.0)] * 23 and rates[23:51] == [(0.001, 1.0)] * 28 and rates[51:68] == [(1e-4, 1.0)] * 17
        assert rates[68:72] == [(1e-4, 0.1)] * 4  # conv1 at 1e-5
        assert rates[72:78] == [(1e-4, 0.0)] * 6 and rates[78:] == [(1e-5, 0.0)] * 15
        assert config.data.lighting_epochs == 68 and config.data.mean == "image_center"
        assert config.model.lrn == LrnConfig(2.0, 5, 2e-5, 0.75) and config.model.layers["conv1"].lrn == "before"
        assert config.model.layers["conv2"].lrn == "after"
        assert [config.model.layers[f"conv{n}"].std for n in range(1, 6)] == [0.01, 0.01, 0.03, 0.03, 0.03]
    assert recipe("ilsvrc2012_as_run").data.index == "indexes/ilsvrc2012"


ROWS = {  # recipe → (the one it is compared with, all keys that differ)
    "ilsvrc2012_no_overlap": ("alexnet_ilsvrc2012", {"model.pool.px": (3, 2)}),
    "ilsvrc2012_no_lighting": ("alexnet_ilsvrc2012", {"data.lighting": (0.1, 0)}),
    "ilsvrc2012_no_dropout": ("alexnet_ilsvrc2012", {"model.dropout": (0.5, 0)}),
    "ilsvrc2012_softmax_only": ("alexnet_ilsvrc2012", {
        **{f"model.layers.{name}.sees": ("both", "own") for name in ("conv3", "fc6", "fc7")},
        "model.layers.fc6.neurons": (4096, 8192)}),
    "ilsvrc2010_one_tower": ("alexnet_ilsvrc2010", {
        "model.towers": (2, 1), "model.layers.conv1.kernels": (96, 48), "model.layers.conv2.kernels": (256, 128),
        "model.layers.conv3.kernels": (384, 192), "model.layers.conv4.kernels": (384, 192)}),
    "tiny100_no_overlap": ("tiny100", {"model.pool.px": (3, 2)}),
    "tiny100_no_lighting": ("tiny100", {"data.lighting": (0.1, 0)}),
    "tiny100_no_dropout": ("tiny100", {"model.dropout": (0.4, 0)}),
    "tiny100_tanh": ("tiny100", {"model.activation": ("relu", "tanh")}),
    "tiny100_no_exchange": ("tiny100", {
        **{f"model.layers.{name}.sees": ("both", "own") for name in ("conv3", "fc6", "fc7")},
        "model.layers.fc6.neurons": (1024, 2048)}),
    "figure1_tanh": ("figure1_relu", {"model.activation": ("relu", "tanh")}),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_ablation_changes_one_thing(name: str) -> None:
    base, expected = ROWS[name]
    assert changed(name, base) == expected


@pytest.mark.parametrize(("name", "base"), [("ilsvrc2012_no_lrn", "alexnet_ilsvrc2012"), ("tiny100_no_lrn", "tiny100")])
def test_no_lrn(name: str, base: str) -> None:
    assert recipe(name).model.lrn is None and all(key.startswith("model.lrn") for key in changed(name, base))


@pytest.mark.parametrize(("name", "base", "layer"), [
    ("ilsvrc2012_without_conv3", "alexnet_ilsvrc2012", "conv3"), ("ilsvrc2012_without_conv4", "alexnet_ilsvrc2012", "conv4"),
    ("ilsvrc2012_without_conv5", "alexnet_ilsvrc2012", "conv5"), ("ilsvrc2012_without_fc7", "alexnet_ilsvrc2012", "fc7"),
    ("tiny100_without_conv3", "tiny100", "conv3")])
def test_a_layer_less(name: str, base: str, layer: str) -> None:
    difference = {key for key in changed(name, base) if not key.startswith(f"model.layers.{layer}.")}
    assert layer not in recipe(name).model.layers
    assert difference == ({"model.layers.conv4.pool"} if layer == "conv5" else set())  # the pooling stays
    pools = [name for name, _ in shapes(recipe(name).model) if name.startswith("pool")]
    assert len(pools) == 3


def test_many_classes() -> None:
    for name, classes in (("fall2009", 10_184), ("fall2011", 21_841)):
        model = recipe(name).model
        assert model.classes == classes
        conv6, fc8 = model.layers["conv6"], model.layers["fc8"]
        assert (conv6.kernels, conv6.px, conv6.pad, conv6.sees, conv6.std, conv6.bias) == (256, 3, 1, "both", 0.03, 1)
        assert (fc8.neurons, fc8.linear, fc8.dropout) == (2048, True, False)  # 1,024 + 1,024
        assert list(model.layers)[4:] == ["conv5", "conv6", "fc6", "fc7", "fc8", "fc9"]
        assert dict(shapes(model))["conv6"] == (256, 6, 6)


def test_fine_tuning_takes_what_pre_training_has() -> None:
    tuned, before = recipe("ilsvrc2012_finetune"), recipe("fall2011")
    assert tuned.init_from.checkpoint == "runs/fall2011" and tuned.init_from.renew == ("fc8",)
    kept = [name for name in tuned.model.layers if name != "fc8"]
    assert all(tuned.model.layers[name] == before.model.layers[name] for name in kept)
    assert tuned.optimizer.layer_rates == {"fc8": 10}


def test_fine_tuning_of_tiny50_has_half_of_the_rates_of_training_from_scratch() -> None:
    """In every epoch; its softmax layer, which is new, has the whole of them."""
    scratch, tuned = recipe("tiny50_second"), recipe("tiny50_finetune")
    ours, theirs = (Schedule(config.schedule, config.optimizer, config.train.batch)
                    for config in (tuned, scratch))
    for epoch in range(scratch.train.epochs):
        assert ours.lr(0, epoch) == pytest.approx(theirs.lr(0, epoch) / 2) and ours.layer_rates(epoch) == {"fc8": 2}, epoch
    differ = {key.split(".")[0] for key in changed("tiny50_finetune", "tiny50_second")}
    assert differ == {"optimizer", "schedule", "init_from"}


def test_pooling_and_normalisation_of_every_paper_recipe() -> None:
    for path in RECIPES:
        config = recipe(path.stem)
        if path.stem.startswith(("ilsvrc", "alexnet", "fall")):
            assert config.model.pool == (PoolConfig(2, 2) if path.stem == "ilsvrc2012_no_overlap" else PoolConfig(3, 2))
            assert config.model.dropout == (0 if path.stem == "ilsvrc2012_no_dropout" else 0.5)
            assert config.data.lighting == (0 if path.stem == "ilsvrc2012_no_lighting" else 0.1)
            as_run = path.stem.endswith("as_run")
            lrn = LrnConfig(2.0, 5, 2e-5 if as_run else 1e-4, 0.75)  # the release divides alpha by the window
            assert config.model.lrn == (None if path.stem == "ilsvrc2012_no_lrn" else lrn)
            assert bool(config.schedule.milestones) == as_run != (config.schedule.plateau is not None)


@pytest.mark.parametrize("path", sorted((FOLDER / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_read(path: Path, tmp_path: Path) -> None:
    """Every run's command line is a recipe's; ensembles have the members that the paper's have."""
    study = read_study(path, tmp_path)
    assert len(study.runs) >= 6
    text = path.read_text(encoding="utf-8")
    assert f"python tools/run_study.py train/recipes/studies/{path.name}" in text.split("\n\n")[0]
    assert all(len(line) <= 130 for line in text.splitlines())
    members = {ensemble.name: sum(run.group in ensemble.of for run in study.runs) for ensemble in study.ensembles}
    assert members == {"ilsvrc2012_ensembles": {"five": 5, "seven": 7}, "tiny100_ablations": {"five": 5}}.get(path.stem, {})


def narrowed(config: Config) -> Config:
    """A recipe with about a sixteenth of its kernels and neurons, and ten classes at most: the same layers, a thousandth of the
    work. (Their gradients are as small, so that float32 would round them away.)"""
    layers = {name: dataclasses.replace(layer, **{key: 2 * max(1, count // 32)}) if count else layer
              for name, layer in config.model.layers.items()
              for key in ["kernels" if name.startswith("conv") else "neurons"] for count in [getattr(layer, key)]}
    model = dataclasses.replace(config.model, layers=layers, classes=min(10, config.model.classes))
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("path", [*RECIPES, SMALL], ids=lambda path: path.stem)
def test_one_step(path: Path, tmp_path: Path) -> None:
    """On pictures of a few classes, from their files to an update that moves every weight."""
    index = write_set(tmp_path, photographs(4), classes=2)
    config = narrowed(parse(["--config", str(path), f"--data.index={index.path}", "--train.batch=2", "--machine.device=cpu",
                             "--machine.threads=1", "--machine.precision=fp64"]).config)
    alone = Topology.single()
    stats = compute(index, "train", config.data.square_px)
    step = TrainStep(config, alone)
    before = {name: parameter.detach().clone() for name, parameter in step.network.named_parameters()}
    with contextlib.closing(build.train_loader(config, alone, index, stats, tmp_path / "quarantine.jsonl")) as loader:
        batch = next(loader)
        step(batch, 0)
    result = next(step.results())[0]
    assert batch.images.shape == (2, 3, config.model.input_px, config.model.input_px)
    assert math.isfinite(result.loss) and 0 <= result.errors <= 2
    for name, parameter in step.network.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), f"{name} has not moved"
