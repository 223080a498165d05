"""Recipes: read strictly, overridden from the command line, written and read back; what a fingerprint covers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.recipes import TEXT, write_recipe
from train.config import Config, differences
from train.recipe import dump, load, parse
from train.run_folder import check_resumable
from train.recipe.strict_yaml import load_yaml

ROOT = Path(__file__).resolve().parents[2]


def read(path: Path, *argv: str) -> Config:
    return parse(["--config", str(path), *argv]).config


def test_recipe_and_overrides(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    request = parse(["--config", str(path), "--optimizer.lr=2e-3", "--machine.name", "x", "--resume", "--model.lrn=null"])
    assert request.resume and request.recipe == path
    config = request.config
    assert config.optimizer.lr == 0.002 and config.optimizer.weight_decay == 5e-4 and config.machine.name == "x"
    assert config.model.lrn is None and [conv.kernels for conv in config.model.convs.values()] == [8, 16, 16, 16, 8]
    assert read(path, "--model.lrn.n=3").model.lrn is not None
    moved = read(path, "--schedule.plateau=null", "--schedule.milestones=[{epoch: 2, lr: 1e-3}]").schedule
    assert moved.milestones[0].lr == 0.001


@pytest.mark.parametrize("text, value", [("5e-4", 5e-4), ("1e-2", 0.01), ("1E5", 1e5), ("1.5", 1.5), (".5", 0.5),
                                         ("2.", 2.0), ("-1e-3", -1e-3), ("3", 3), ("1e", "1e"), ("e-4", "e-4")])
def test_numbers_as_people_write_them(text: str, value: object) -> None:
    got = load_yaml(f"a: {text}")["a"]
    assert got == value and type(got) is type(value)


def test_same_key_twice_is_an_error(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, momentum="  momentum: 0.9\n  momentum: 0.8")
    with pytest.raises(ValueError, match=r"key 'momentum' \(line \d+\) is given twice; keep one"):
        read(path)
    with pytest.raises(ValueError, match="'a'.*twice"):
        load_yaml("b: {a: 1, a: 1}")


@pytest.mark.parametrize("argv, message", [
    (["--optimizer.lrr=3"], r"--optimizer.lrr \(=3\) is no option; did you mean --optimizer.lr\?"),
    (["--optimizer.lr=fast"], r"optimizer.lr \(=fast on the command line\) must be a number; correct it"),
    (["--train.seed=1.5"], r"train.seed \(=1.5 on the command line\) must be a whole number; "),
    (["--machine.device=tpu"], r"machine.device \(=tpu\) must be auto, cpu, cuda or cuda:N; "),
    (["--model.lrn.n=4"], r"model.lrn.n \(=4\) must be odd"),
    (["--optimizer.lr=-1"], r"optimizer.lr \(=-1.0\) must be positive; the paper starts at 0.01"),
    (["--optimizer.momentum=1"], r"optimizer.momentum \(=1.0\) must be in \[0, 1\)"),
    (["--optimizer.weight_decay=-1"], r"optimizer.weight_decay \(=-1.0\) must not be negative"),
    (["--optimizer.bias_lr_factor=0"], r"optimizer.bias_lr_factor \(=0.0\) must be positive"),
    (["--train.epochs=0"], r"train.epochs \(=0\) must be at least 1"),
    (["--train.batch=0"], r"train.batch \(=0\) must be at least 1"),
    (["--train.seed=-1"], r"train.seed \(=-1\) must be in"),
    (["--train.validate_views=5"], r"train.validate_views \(=5\) must be 1 \(centre\) or 10"),
    (["--train.test_views=2"], r"train.test_views \(=2\) must be 1 \(centre\) or 10"),
    (["--schedule.plateau.factor=2"], r"schedule.plateau.factor \(=2.0\) must be in \(0, 1\)"),
    (["--schedule.plateau.patience=0"], r"schedule.plateau.patience \(=0\) must be at least 1 epoch"),
    (["--schedule.plateau.min_delta=-1"], r"schedule.plateau.min_delta \(=-1.0\) must not be negative"),
    (["--schedule.plateau.drops=-1"], r"schedule.plateau.drops \(=-1\) must not be negative"),
    (["--schedule.warmup_steps=-1"], r"schedule.warmup_steps \(=-1\) must not be negative"),
    (["--schedule.milestones=[{epoch: 2, lr: 1}]"], r"schedule.milestones \(=\[2\]\) cannot be given together with"),
    (["--schedule.plateau=null", "--schedule.milestones=[{epoch: 3, lr: 1}, {epoch: 2, lr: 1}]"],
     r"schedule.milestones \(=\[3, 2\]\) must have ascending epochs"),
    (["--schedule.plateau=null", "--schedule.milestones=[{epoch: 0, lr: 1}]"], r"epoch \(=0\) must be at least 1"),
    (["--schedule.plateau=null", "--schedule.milestones=[{epoch: 1, lr: 0}]"], r"lr \(=0.0\) must be positive"),
    (["--data.crop_px=60"], r"model.input_px \(=67\) must equal data.crop_px \(=60\)"),
    (["--machine.threads=-1"], r"machine.threads \(=-1\) must be at least 0"),
    (["--machine.sync_steps=2000"], r"machine.sync_steps \(=2000\) must be at most 1024"),
    (["--machine.keep_last=0"], r"machine.keep_last \(=0\) must be at least 1"),
    (["--machine.timeout_s=0"], r"machine.timeout_s \(=0.0\) must be positive"),
])
def test_mistakes_on_the_command_line(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write_recipe(tmp_path), *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, line, message", [
    ("momentum", "  mommentum: 0.9", r"small.yaml, line 31\) is no key that is known; did you mean optimizer.momentum\?"),
    ("momentum", "", r"optimizer.momentum is missing; a field"),
    ("lrn", "", r"model.lrn is missing; a field that changes results has no default.*--model.lrn=VALUE"),
    ("plateau", "", r"schedule.plateau is missing; "),
    ("plateau", "  plateau: {factor: 0.1, patience: 1, drops: 3}", r"schedule.plateau.min_delta is missing; "),
    ("plateau", "  plateau: {factor: 0.1, patience: 1, min_delt: 0, drops: 3}", r"min_delt \(=0 in .*mean .*min_delta\?"),
    ("train", "trainn:", r"trainn \(=.* is no key that is known; did you mean train\?"),
    ("conv2", "    conv2: {kernels: 16, px: 5, std: 0.05}", r"model.layers.conv2.bias is missing; a field that changes results"),
    ("conv2", "    conv2: {kernels: 16, px: 5, std: 0.05, bias: 1, strid: 1}", r"strid \(=1 in .*line 22\) is no .*stride\?"),
    ("conv2", "    conv2: 16", r"model.layers.conv2 \(=16 in .*\) must say what the layer is; write \{kernels, px, "),
    ("fc7", "    fc7: {neurons: 1.5, std: 0.05, bias: 1}", r"model.layers.fc7.neurons \(=1.5 in .*\) must be a whole number; "),
    ("fc7", "    fc7: {neurons: 16, std: -1, bias: 1}", r"model.layers.fc7.std \(=-1.0\) must be no negative deviation"),
    ("fc7", "    fc7: {neurons: 17, std: 1, bias: 1}", r"model.layers.fc7.neurons \(=17\) must be a positive multiple of the 2"),
    ("fc7", "    fc7: {neurons: 16, std: 1, bias: 1, sees: all}", r"model.layers.fc7.sees \(=all in .*\) must be one of own"),
    ("fc7", "    fc7: {neurons: 16, std: 1, bias: 1, dropout: 0.5}", r"model.layers.fc7.dropout \(=0.5 in .*\) must be true"),
    ("fc7", "    full7: {neurons: 16, std: 1, bias: 1}", r"model.layers.full7 \(=.*must have names conv1 … conv99 and fc1"),
    ("fc8", "    fc8: {neurons: 6, std: 1, bias: 1}", r"model.layers.fc8.neurons \(=6\) must be left out of the last layer"),
    ("activation", "  activation: gelu", r"model.activation \(=gelu in .*must be one of relu, tanh"),
    ("seed", "  seed: [", r"while parsing"),
])
def test_mistakes_in_a_recipe(tmp_path: Path, name: str, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_recipe(tmp_path, **{name: line}))


def test_no_recipe_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe \(=.*none.yaml\) does not exist; give a YAML file, or one of alexnet_"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"RECIPE \(=none\) must be given, such as demo; `alexnet train --list`"):
        parse([])


@pytest.mark.parametrize(("name", "line", "key"), [
    ("lr", "  lr: .nan", "optimizer.lr"), ("lighting", "  lighting: .inf", "data.lighting"),
    ("conv4", "    conv4: {kernels: 16, px: 3, std: .nan, bias: 1}", "model.layers.conv4.std"),
    ("lrn", "  lrn: {k: 2, n: 5, alpha: 1e-4, beta: .inf}", "model.lrn.beta")])
def test_numbers_are_finite(tmp_path: Path, name: str, line: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} \(=.*(nan|inf).*\) must be "):
        read(write_recipe(tmp_path, **{name: line}))


def test_doubts(tmp_path: Path) -> None:
    """What a run says and will never use: one line for each key."""
    config = read(write_recipe(tmp_path), "--train.epochs=3", "--schedule.plateau=null", "--data.window=100",
                  "--schedule.warmup_steps=28",
                  "--schedule.milestones=[{epoch: 2, lr: 1e-3}, {epoch: 3, lr: 1e-4}, {epoch: 9, lr: 1e-5}]")
    assert config.doubts(27) == [
        "data.window is of no use to data.tier: archives, only to streamed",
        "schedule.warmup_steps (=28) is more than the 27 steps of the run, which never reaches its learning rate",
        "schedule.milestones (epoch 3, 9) without effect: training ends after epoch 3"]
    halves = parse(["--config", str(write_recipe(tmp_path)), "--model.towers=1", "--machine.tower_convs=halves"]).config
    assert halves.doubts(27) == ["machine.tower_convs is of no use to model.towers: 1, only to 2 in one process"]


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = read(write_recipe(tmp_path), "--optimizer.lr=1e-5", "--machine.threads=3", "--model.lrn=null")
    (tmp_path / "resolved.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "resolved.yaml") == config


def test_fingerprint_covers_what_changes_results_only(tmp_path: Path) -> None:
    config = read(write_recipe(tmp_path))
    mark = config.fingerprint()
    path = write_recipe(tmp_path, index="elsewhere")
    assert read(path, "--machine.device=cpu", "--machine.threads=7", "--machine.precision=bf16").fingerprint() == mark
    for change in ("--optimizer.lr=0.02", "--train.seed=2", "--data.mirror=false", "--model.dropout=0.4",
                   "--schedule.plateau=null", "--train.epochs=4", "--data.test_split=train", "--model.lrn.k=1"):
        assert read(path, change).fingerprint() != mark, change


def test_differences_name_both_values(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    old, new = read(path), read(path, "--optimizer.lr=0.5", "--model.lrn=null", "--machine.threads=3", "--data.index=x")
    lines = differences(new.as_dict(), old.as_dict())
    assert lines == ["model.lrn: {'k': 2.0, 'n': 5, 'alpha': 0.0001, 'beta': 0.75} -> None",
                     "optimizer.lr: 0.01 -> 0.5"]


@pytest.mark.parametrize("module", ["train.main", "train.evaluate"])
def test_help_answers_without_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", module, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "usage" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "train" in imported and not imported & {"torch", "nvidia", "numpy", "scipy"}


def test_print_config_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--config", str(write_recipe(tmp_path)), "--train.seed=9", "--print_config"])
    printed = load_yaml(capsys.readouterr().out)
    assert left.value.code == 0 and printed["train"]["seed"] == 9 and printed["machine"]["prefetch"] == 2
    assert printed["model"]["lrn"]["alpha"] == 1e-4 and printed.keys() >= load_yaml(TEXT).keys()


def test_a_recipe_of_version_0_1_with_lrn_across_false_is_read(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    old = tmp_path / "old.yaml"
    old.write_text(dump(read(path)).replace("    beta: 0.75\n", "    beta: 0.75\n    across: false\n"), encoding="utf-8")
    assert "across: false" in old.read_text() and load(old) == read(path)
    with pytest.raises(ValueError, match=r"^recipe \(=train.seed: 1 in the run, 2 now\) is not"):  # no word of `across`
        check_resumable(read(path, "--train.seed=2"), old)
    old.write_text(old.read_text().replace("across: false", "across: true"), encoding="utf-8")
    with pytest.raises(ValueError, match="across"):
        load(old)
