"""Recipes that say only what is different: `extends`, several --config, and single layers on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.recipes import TEXT, write_recipe
from train.config import Config
from train.optimizer_config import Milestone
from train.recipe import dump, load, parse, read_recipe
from train.recipe.strict_yaml import load_yaml

LAYERS = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def child(folder: Path, text: str, name: str = "child.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, *argv: str) -> Config:
    return parse(["--config", str(path), *argv]).config


def error(*argv: str) -> str:
    with pytest.raises(ValueError) as caught:
        parse(argv)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    return str(caught.value)


# --- extends

def test_only_what_is_said_differs(small: Path, tmp_path: Path) -> None:
    parent = read(small)
    assert read(child(tmp_path, "extends: small.yaml\n")) == parent
    request = parse(["--config", str(child(tmp_path, "extends: small.yaml\noptimizer: {lr: 5e-4}\nmodel: {lrn: {n: 3}}\n"))])
    config = request.config
    assert request.recipe == tmp_path / "child.yaml", "the run folder has the child's name"
    assert config.optimizer.lr == 5e-4 and config.optimizer.momentum == parent.optimizer.momentum
    assert config.model.lrn is not None and (config.model.lrn.n, config.model.lrn.k, config.model.lrn.alpha) == (3, 2, 1e-4)
    assert config.data == parent.data and config.model.layers == parent.model.layers


def test_a_chain_through_folders(small: Path, tmp_path: Path) -> None:
    """Each `extends` is relative to the file it stands in; the last one says it last."""
    child(tmp_path, "extends: ../small.yaml\ntrain: {seed: 2, epochs: 5}\noptimizer: {lr: 1}\n", "a/middle.yaml")
    config = read(child(tmp_path, "extends: ../a/middle.yaml\ntrain: {seed: 3}\n", "b/last.yaml"))
    assert (config.train.seed, config.train.epochs, config.train.batch, config.optimizer.lr) == (3, 5, 8, 1.0)


def test_null_takes_a_layer_away_and_a_grandchild_gives_another(small: Path, tmp_path: Path) -> None:
    path = child(tmp_path, "extends: small.yaml\nmodel: {lrn: null, layers: {conv3: null, conv4: {sees: both}}}\n")
    config = read(path)
    assert list(config.model.layers) == [name for name in LAYERS if name != "conv3"] and config.model.lrn is None
    assert config.model.layers["conv4"].sees == "both" and config.model.layers["conv4"].kernels == 16
    grand = child(tmp_path, "extends: child.yaml\nmodel: {layers: {conv3: {kernels: 4, px: 3, pad: 1, std: 0.1, bias: 0}}}\n",
                  "grand.yaml")
    assert list(read(grand).model.layers) == LAYERS and read(grand).model.layers["conv3"].kernels == 4
    half = child(tmp_path, "extends: child.yaml\nmodel: {layers: {conv3: {kernels: 4}}}\n", "half.yaml")
    assert "model.layers.conv3.px is missing; a field that changes results has no" in error("--config", str(half))


def test_a_layer_is_added_in_its_place(small: Path, tmp_path: Path) -> None:
    path = child(tmp_path, "extends: small.yaml\nmodel:\n  layers:\n    conv6: {kernels: 4, px: 1, std: 0.1, bias: 0}\n"
                 "    fc8: {neurons: 10, linear: true}\n    fc9: {std: 0.1, bias: 0}\n")
    model = read(path).model
    assert list(model.layers) == [*LAYERS[:5], "conv6", *LAYERS[5:], "fc9"] and model.last == "fc9"
    assert model.layers["fc8"].neurons == 10 and model.layers["fc8"].std == 0.05


def test_lists_are_replaced_not_joined(small: Path, tmp_path: Path) -> None:
    parent = child(tmp_path, "extends: small.yaml\n"
                   "schedule: {plateau: null, milestones: [{epoch: 1, lr: 1}, {epoch: 2, lr: 0.5}]}\n", "parent.yaml")
    assert len(read(parent).schedule.milestones) == 2
    config = read(child(tmp_path, "extends: parent.yaml\nschedule: {milestones: [{epoch: 3, lr: 0.1}]}\n"))
    assert config.schedule.milestones == (Milestone(3, 0.1),)


def test_a_group_with_nothing_beneath_says_nothing(small: Path, tmp_path: Path) -> None:
    path = child(tmp_path, "extends: small.yaml\nmachine:\n  # threads: 4\nparallel: null\ninit_from: null\n")
    assert read(path).machine.threads == 0 and read(path).init_from == read(small).init_from
    assert "train.epochs is missing; " in error("--config", str(child(tmp_path, "extends: small.yaml\ntrain: null\n")))


def test_extends_null_is_none_and_it_is_no_key_of_a_config(small: Path, tmp_path: Path) -> None:
    assert read(child(tmp_path, f"extends: null\n{TEXT}")) == read(child(tmp_path, TEXT, "plain.yaml"))
    assert "extends" not in read_recipe(child(tmp_path, "extends: small.yaml\n")) and "extends" not in read(small).as_dict()
    assert "--extends (=small.yaml) is no option" in error("--config", str(small), "--extends=small.yaml")


def test_circles_are_named(tmp_path: Path) -> None:
    own = child(tmp_path, "extends: child.yaml\n")
    assert error("--config", str(own)) == (f"extends (=child.yaml in {own}) leads back to itself; take one of the lines away")
    a, b = child(tmp_path, "extends: sub/b.yaml\n", "a.yaml"), child(tmp_path, "extends: ../a.yaml\n", "sub/b.yaml")
    assert error("--config", str(a)).startswith(f"extends (=a.yaml in {tmp_path}/sub/b.yaml) leads back to itself; take one")
    assert "extends (=b.yaml in " in error("--config", str(b))


@pytest.mark.parametrize(("text", "message"), [
    ("extends: mine.yaml\n", "recipe (={folder}/mine.yaml) does not exist; give a YAML file, or one of alexnet_ilsvrc2010, "
     "alexnet_ilsvrc2012, demo, fall2009, fall2011, [...], or correct extends in {folder}/child.yaml"),
    ("extends: .\n", "recipe (={folder}) is no file; "),
    ("extends: 3\n", "extends (=3 in {folder}/child.yaml) must be the name of a recipe beside it; correct it"),
    ("extends: [small.yaml]\n", "extends (=['small.yaml'] in {folder}/child.yaml) must be the name of a recipe beside it; "),
    ("extends: false\n", "extends (=False in {folder}/child.yaml) must be the name"),
    ("extends: small.yaml\nextends: a.yaml\n",
     "recipe (={folder}/child.yaml) is no YAML: key 'extends' (line 2) is given twice; keep one"),
    ("- extends\n", "recipe (={folder}/child.yaml) must be groups of keys, not a list; see train/recipes/demo.yaml"),
    ("extends: {\n", "recipe (={folder}/child.yaml) is no YAML: while parsing"),
    ("extends: list.yaml\n", "recipe (={folder}/list.yaml) must be groups of keys, not a str; "),
    ("extends: latin.yaml\n", "recipe (={folder}/latin.yaml) is no YAML: 'utf-8' codec can't decode"),
    ("extends: small.yaml\noptimizer: {lrr: 1}\n", "optimizer.lrr (=1 in {folder}/child.yaml, line 2) is no key that is known"),
    ("extends: small.yaml\nmodel: {layers: [conv1]}\n", "must map names to layers; write conv1: {{"),
    ("extends: small.yaml\nmodel: 3\n", "model (=3 in {folder}/child.yaml, line 2) must be a group of keys; "),
])
def test_mistakes(small: Path, tmp_path: Path, text: str, message: str) -> None:
    child(tmp_path, "conv1", "list.yaml")
    (tmp_path / "latin.yaml").write_bytes("# für\n".encode("latin-1"))
    assert message.format(folder=tmp_path) in error("--config", str(child(tmp_path, text)))


def test_a_missing_field_is_still_missed(small: Path, tmp_path: Path) -> None:
    child(tmp_path, TEXT.replace("  lrn: {k: 2, n: 5, alpha: 1e-4, beta: 0.75}\n", ""), "parent.yaml")
    path = child(tmp_path, "extends: parent.yaml\ntrain: {seed: 2}\n")
    assert "model.lrn is missing; a field that changes results has no default" in error("--config", str(path))
    assert read(path, "--model.lrn=null").model.lrn is None


# --- the command line

def test_several_recipes_are_laid_over_each_other(small: Path, tmp_path: Path) -> None:
    """The later one says it last, its `extends` included; the run has its name."""
    fast = child(tmp_path, "optimizer: {lr: 1}\nmodel: {layers: {conv3: null}}\n", "fast.yaml")
    request = parse(["--config", str(small), "--train.seed=5", f"--config={fast}"])
    config = request.config
    assert request.recipe == fast and config.optimizer.lr == 1 and config.train.seed == 5 and "conv3" not in config.model.layers
    assert read(fast, f"--config={small}").optimizer.lr == 0.01
    other = child(tmp_path, "extends: small.yaml\ntrain: {epochs: 7}\n")
    assert (read(fast, f"--config={other}").optimizer.lr, read(fast, f"--config={other}").train.epochs) == (0.01, 7)


def test_single_layers(small: Path, tmp_path: Path) -> None:
    conv3 = read(small).model.layers["conv3"]
    assert "conv3" not in read(small, "--model.layers.conv3=null").model.layers
    for words in (["--model.layers.conv3.kernels=32"], ["--model.layers.conv3.kernels", "32"],
                  ["--model.layers.conv3={kernels: 32}"]):
        changed = read(small, *words).model.layers["conv3"]
        assert (changed.kernels, changed.px, changed.std, changed.sees) == (32, conv3.px, conv3.std, conv3.sees)
    both = read(small, "--model.layers.conv3.kernels=32", "--model.layers.conv3.std=1e-3", "--model.layers.fc7=null",
                "--model.layers.conv3.kernels=64").model.layers
    assert (both["conv3"].kernels, both["conv3"].std) == (64, 1e-3) and "fc7" not in both
    added = read(small, "--model.layers.conv6={kernels: 4, px: 1, std: 0.1, bias: 0}", "--model.lrn=null", "--train.seed=3")
    assert list(added.model.layers)[5] == "conv6" and added.model.lrn is None and added.train.seed == 3
    without = child(tmp_path, "extends: small.yaml\nmodel: {layers: {conv3: null}}\n")
    assert read(without, "--model.layers.conv3={kernels: 4, px: 3, pad: 1, std: 0.1, bias: 0}").model.layers["conv3"].kernels == 4
    several = read(small, "--model.layers={conv3: null, conv4: {kernels: 8}}").model.layers  # as in a recipe: the others stay
    assert list(several) == [name for name in LAYERS if name != "conv3"] and several["conv4"].kernels == 8
    ahead = parse(["--model.layers.conv3=null", f"--config={small}"])  # whatever stands first: the command line says it last
    assert "conv3" not in ahead.config.model.layers


@pytest.mark.parametrize(("words", "message"), [
    (["--model.layers.conv3"], "--model.layers.conv3 (=none) must have a value; write --model.layers.conv3=VALUE"),
    (["--model.layers.conv3=["], "--model.layers.conv3 (=[) is no YAML (while parsing a flow node"),
    (["--model.layers.conv3={px: 3, px: 3}"], "key 'px' (line 1) is given twice; keep one"),
    (["--model.layers.conv3.kernel=32"], "kernel (=32 on the command line) is no key that is known; did you mean model.lay"),
    (["--model.layers.conv3.kernels=many"], "model.layers.conv3.kernels (=many on the command line) must be a whole number"),
    (["--model.layers.conv3.std=.nan"], "model.layers.conv3.std (=nan) must be a finite number; "),
    (["--model.layers.conv3.std=1e999"], "model.layers.conv3.std (=inf) must be a finite number; "),
    (["--model.layers.conv3.kernels="], "model.layers.conv3.kernels (=None on the command line) must be a whole number"),
    (["--model.layers.conv3.sees=all"], "model.layers.conv3.sees (=all on the command line) must be one of own, both"),
    (["--model.layers.conv9.kernels=4"], "model.layers.conv9.px is missing; a field that changes results has no default"),
    (["--model.layers.fc8=null"], "model.layers.fc7.neurons (=16) must be left out of the last layer"),
    (["--model.layers.=3"], "model.layers. (=3 on the command line) must have names conv1"),
    (["--config"], "--config (=none) must have a value; write --config=VALUE"),
])
def test_mistakes_about_single_layers(small: Path, words: list[str], message: str) -> None:
    assert message in error(f"--config={small}", *words)


def test_a_resolved_config_says_the_same_again(small: Path, tmp_path: Path) -> None:
    path = child(tmp_path, "extends: small.yaml\nmodel: {lrn: null, layers: {conv3: null, fc7: {dropout: false}}}\n"
                 "optimizer: {layer_rates: {conv1: 0, fc8: 10}}\ninit_from: {checkpoint: runs/x, renew: [fc8]}\n")
    config = read(path, "--model.layers.conv4.kernels=8", "--schedule.plateau=null",
                  "--schedule.milestones=[{epoch: 1, lr: 1e-3, layer_rates: {conv2: 0.5}}]")
    resolved = child(tmp_path, dump(config), "config.yaml")
    assert load(resolved) == config and load(resolved).fingerprint() == config.fingerprint()
    assert "extends" not in load_yaml(dump(config)) and read(resolved, "--train.seed=9").train.seed == 9
    assert read(child(tmp_path, "extends: config.yaml\n")) == config, "a run's recipe can be extended"


def test_print_config_shows_the_whole(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = child(tmp_path, "extends: small.yaml\ntrain: {epochs: 7}\n")
    with pytest.raises(SystemExit) as left:
        parse(["--config", str(path), "--model.layers.conv3=null", "--model.layers.conv4.kernels=8", "--print_config"])
    printed = load_yaml(capsys.readouterr().out)
    layers = printed["model"]["layers"]
    assert left.value.code == 0 and printed["train"] == {**load_yaml(TEXT)["train"], "epochs": 7}
    assert "conv3" not in layers and layers["conv4"]["kernels"] == 8 and layers["conv5"]["kernels"] == 8
    assert "extends" not in printed and printed["init_from"] == {"checkpoint": "", "renew": []}


# --- what names layers must name layers of the network

@pytest.mark.parametrize(("words", "message"), [
    (["--optimizer.layer_rates={conv9: 0.1}"], "optimizer.layer_rates (=conv9) must name layers of the network: conv1, conv2"),
    (["--optimizer.layer_rates={conv3: 0.1}", "--model.layers.conv3=null"], "optimizer.layer_rates (=conv3) must name layers of"),
    (["--optimizer.layer_rates={weights: 1}"], "optimizer.layer_rates (=weights) must name layers, such as conv1 or fc8; "),
    (["--optimizer.layer_rates={conv1: -1}"], "optimizer.layer_rates.conv1 (=-1) must be a factor of at least 0, which freezes"),
    (["--optimizer.layer_rates={conv1: .inf}"], "optimizer.layer_rates.conv1 (=inf) must be a finite number; "),
    (["--optimizer.layer_rates={conv1: true}"], "optimizer.layer_rates.conv1 (=True) must be a factor of at least 0"),
    (["--optimizer.layer_rates={conv1: null}"], "optimizer.layer_rates.conv1 (=None) must be a factor of at least 0"),
    (["--optimizer.layer_rates=[conv1]"], "must map names to values; write {name: value, …}"),
    (["--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 1}, {epoch: 2, lr: 1, layer_rates: {fc9: 1}}]"],
     "schedule.milestones[1].layer_rates (=fc9) must name layers of the network"),
    (["--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 1, layer_rates: {fc8: x}}]"],
     "schedule.milestones.layer_rates.fc8 (=x) must be a factor of at least 0"),
    (["--init_from.renew=[fc8]"], "init_from.renew (=['fc8']) needs init_from.checkpoint; say where the other layers come from"),
    (["--init_from.checkpoint=x", "--init_from.renew=[fc9]"], "init_from.renew (=fc9) must name layers of the network"),
    (["--init_from.checkpoint=x", "--init_from.renew=fc8"], "init_from.renew (=fc8 on the command line) must be a list; "),
])
def test_layers_that_are_not_there(small: Path, words: list[str], message: str) -> None:
    assert message in error(f"--config={small}", *words)


def test_new_groups_leave_old_recipes_and_runs_as_they_were(small: Path) -> None:
    """Where pre-trained weights lie is no setting; what is renewed and what is frozen is."""
    plain = read(small)
    assert plain.optimizer.layer_rates == {} and (plain.init_from.checkpoint, plain.init_from.renew) == ("", ())
    assert read(small, "--init_from.checkpoint=x").fingerprint() == plain.fingerprint()
    for words in (["--init_from.checkpoint=x", "--init_from.renew=[fc8]"], ["--optimizer.layer_rates={conv1: 0}"]):
        assert read(small, *words).fingerprint() != plain.fingerprint()
