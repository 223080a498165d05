"""The command train.export on a run: its checkpoints, what its card says was measured, class names, mistakes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.alexnet import AlexNet, canonical_shapes
from pipeline.files import file_sha256
from pipeline.index.sample_index import SampleIndex
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.networks import small, tensors_of
from tests.helpers.recipes import write_recipe
from tests.helpers.small_set import photographs, write_set
from tests.helpers.runs import here, inside
from train.checkpoint import checkpoint
from train.checkpoint.resolve import resolve
from train.export import __main__ as export, safetensors_io as weights
from train.evaluate.__main__ import main as evaluate_main
from train.recipe import dump, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, both checkpoints kept, tested at the end."""
    folder = tmp_path_factory.mktemp("trained")
    here(write_recipe(folder, tiny_set.index, epochs="  epochs: 2"), folder, "--machine.name=run")
    return folder / "run"


def exported(run: Path, out: Path, *more: object, code: int = 0) -> tuple[str, str]:
    return inside(export.main, [str(run), "--out", str(out), *map(str, more)], code)


def of_run(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


def row(split: str, views: int, score: dict[str, Any]) -> str:
    return f"| {split} | {score['images']} | {views} | {score['top1']:.2%} |"


def test_command_exports_a_run(tiny_set: TinySet, trained: Path, tmp_path: Path) -> None:
    out, last = tmp_path / "out", sorted((trained / "checkpoints").iterdir())[-1]
    said, warned = exported(trained, out, "--which", "last", "--onnx")
    assert warned == "" and "model.safetensors 0, model.onnx " in said and f"{out}: " in said and len(said.splitlines()) == 2
    config, index = load(last / "config.yaml"), SampleIndex.load(tiny_set.index)
    network = weights.from_pretrained(out)
    stored = {name: torch.empty(shape) for name, shape in canonical_shapes(config.model).items()}
    checkpoint.load(last, {f"weight.{name}": tensor for name, tensor in stored.items()},
                    {f"weight.{name}": tuple(tensor.shape) for name, tensor in stored.items()},
                    ALONE, partial=True)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
    lines = (out / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{entry.wnid} {entry.words}" for entry in index.classes] and len(lines) == 6
    text = (out / "README.md").read_text(encoding="utf-8")
    test, epoch = of_run(trained, "test")[0], of_run(trained, "epoch")[1]
    assert row("val", 10, test) + " the end of training |" in text
    assert row("val", 1, epoch["validation"]) + " the validation after epoch 2 |" in text
    assert text.count("| val |") == 2 and "6 of the 6 outputs" in text
    state, metadata = checkpoint.read_state(last), weights.read_metadata(out)
    manifest = file_sha256(last / "manifest.json")
    assert (metadata["classes_sha256"], metadata["checkpoint_sha256"]) == (state["classes"], manifest)
    assert metadata["fingerprint"] == state["fingerprint"] == load(out / "config.yaml").fingerprint()
    for digest in (manifest, state["sources"]["training images"], state["sources"]["stats"], state["classes"]):
        assert digest in text
    assert f"trained with torch {torch.__version__}" in text and f"Trained for {state['step']:,} steps of 8 images" in text
    assert Stats.load(out / "stats.npz").sha256 == Stats.load(last / "stats.npz").sha256
    for path in out.iterdir():
        found = path.read_bytes()
        for place in (tmp_path, tiny_set.folder, trained):
            assert str(place).encode() not in found, f"{path} says where it was made"


def test_card_of_a_checkpoint_before_an_extension_has_no_test_of_the_extended_run(tiny_set: TinySet, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_set.index, epochs="  epochs: 1")
    here(recipe, tmp_path, "--machine.name=run")
    here(recipe, tmp_path, "--machine.name=run", "--resume", "--train.epochs=2")
    for path, rows in zip(sorted((tmp_path / "run" / "checkpoints").iterdir()), (0, 1), strict=True):
        exported(path, tmp_path / "cards" / path.name)
        text = (tmp_path / "cards" / path.name / "README.md").read_text(encoding="utf-8")
        assert text.count("the end of training |") == rows, path.name


def test_best_and_earlier_checkpoints_have_their_own_results(tiny_set: TinySet, trained: Path, tmp_path: Path) -> None:
    first, last = sorted((trained / "checkpoints").iterdir())
    exported(first, tmp_path / "first")
    text = (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    assert row("val", 1, of_run(trained, "epoch")[0]["validation"]) in text and text.count("| val |") == 1
    best = checkpoint.best(trained / "checkpoints")
    assert best is not None
    exported(trained, tmp_path / "best", "--which", "best")
    assert f"(checkpoint `{best.name}`)" in (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    copied = tmp_path / "elsewhere" / last.name
    shutil.copytree(last, copied)
    exported(copied, tmp_path / "alone")
    assert "Nothing has been measured of these weights" in (tmp_path / "alone" / "README.md").read_text(encoding="utf-8")


def test_saved_evaluations_are_on_the_card_of_their_checkpoint(tiny_set: TinySet, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    first, last = sorted((run / "checkpoints").iterdir())
    printed, _ = inside(evaluate_main, ["--checkpoint", str(first), "--views", "10"], 0)
    for path, count in ((first, 1), (last, 0)):
        exported(path, tmp_path / path.name)
        text = (tmp_path / path.name / "README.md").read_text(encoding="utf-8")
        assert text.count("a saved evaluation |") == count
        shown = re.search(r"\| val \| 24 \| 10 \| (\S+%) \| a saved evaluation", text)
        assert (shown is not None) == bool(count) and (shown is None or shown[1] in printed)
    (run / "evaluations" / "odd").mkdir()
    _, warned = exported(first, tmp_path / "again")
    assert warned.startswith("warning: ") and warned.count("\n") == 1
    assert "a saved evaluation |" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")


def test_float64_weights_become_float32(trained: Path, tmp_path: Path) -> None:
    model = small()
    tensors = {f"weight.{name}": tensor.double() / 3 for name, tensor in tensors_of(model).items()}
    last = sorted((trained / "checkpoints").iterdir())[-1]
    config = dataclasses.replace(load(last / "config.yaml"), model=model)
    state = {name: value for name, value in checkpoint.read_state(last).items() if name != "format"}

    def attach(folder: Path) -> None:
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        shutil.copy(last / "stats.npz", folder)

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    path = checkpoint.save(tmp_path, "step-000000001", tensors, shapes, state, attach, ALONE)
    network = AlexNet(model, seed=0)
    resolve(path).load_weights(network, config, ALONE)
    for name, tensor in network.named_parameters():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[f"weight.{name}"].float())


def test_mistakes_are_named(tiny_set: TinySet, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, last = tmp_path / "out", sorted((trained / "checkpoints").iterdir())[-1]

    def tried(path: Path, *more: object, code: int = 2) -> str:
        _, said = exported(path, out, *more, code=code)
        assert said.startswith("error: ") and said.count("\n") == 1 and not out.exists(), said
        return said

    assert f"checkpoint (={tmp_path}) is not recognised; give a run folder or a checkpoint" in tried(tmp_path)
    assert "does not exist; make one with `alexnet index build`" in tried(trained, "--index", tmp_path / "nowhere")
    damaged = tmp_path / last.name
    shutil.copytree(last, damaged)
    (damaged / "stats.npz").write_bytes(b"")
    assert "stats.npz) has 0 bytes, was written with" in tried(damaged, code=4)

    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "safetensors (=not installed) is needed to read and write model.safetensors; pip install saf" in tried(trained, code=4)


def test_an_index_that_is_gone_or_another_gives_no_class_names(tiny_set: TinySet, trained: Path, tmp_path: Path) -> None:
    last = sorted((trained / "checkpoints").iterdir())[-1]
    other = write_set(tmp_path / "other", photographs(6), photographs(6))
    _, said = exported(trained, tmp_path / "out", "--index", other.path, code=2)
    assert "has other classes, or another order of them, than the one the network was trained on" in said
    copied = tmp_path / last.name
    shutil.copytree(last, copied)
    path, manifest = copied / "config.yaml", json.loads((copied / "manifest.json").read_text())
    path.write_text(path.read_text().replace(load(path).data.index, str(tmp_path / "gone")))
    manifest["files"]["config.yaml"] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    said, _ = exported(copied, tmp_path / "out")
    assert "classes.txt was not written: index (=" in said and not (tmp_path / "out" / "classes.txt").exists()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "6 outputs; their order is not written here: the index was not at hand" in text and str(tmp_path) not in text
    assert load(tmp_path / "out" / "config.yaml").data.index == "gone"


def test_help_answers_without_torch() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "train.export", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage" in done.stdout and "train" in imported and not imported & {"torch", "numpy", "nvidia"}
