"""Checkpoints, evaluations and exported networks with flipped bits, and forged ones with the right hashes, seeded and counted."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from model.alexnet import AlexNet
from pipeline.files import file_entries, with_own_hash
from pipeline.index.sample_index import SampleIndex
from pipeline.reading.quarantine import Quarantine
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE, SHAPES, save, tensors
from tests.helpers.recipes import write_recipe
from tests.helpers.trials import Row, flipped
from train import run_folder
from train.checkpoint import checkpoint
from train.checkpoint.resolve import resolve
from train.evaluate import ensemble, predictions
from train.export import safetensors_io
from train.export.folder import About, write_folder
from train.recipe import load
from train.report.runs import read_run

TIERS = pytest.mark.parametrize("count", [24, pytest.param(1500, marks=pytest.mark.slow)])
Record = Callable[[str, object], None]
FORGED: list[Any] = [None, True, -5, 0, 3, 1e300, float("nan"), "", "x", "../x", "/etc/passwd", [], [1], {}, {"a": 1}, 10 ** 30]


def flip(original: Path, folder: Path, draw: random.Random, leave_out: tuple[str, ...] = ()) -> str:
    """A copy of a folder with one damaged file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    path = draw.choice(sorted(path for path in folder.iterdir() if path.name not in leave_out))
    data, fault = flipped(path.read_bytes(), draw)
    path.write_bytes(data)
    return f"{path.name}: {fault}"


def read_checkpoint(path: Path) -> tuple[dict[str, Any], list[list[float]], bytes]:
    checkpoint.verify(path)
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    checkpoint.load(path, found, SHAPES, ALONE)
    values = [tensor.flatten().tolist() for tensor in found.values()]
    return checkpoint.read_state(path), values, (path / "stats.npz").read_bytes()


def read_evaluation(path: Path) -> Any:
    saved = predictions.load(path)
    return asdict(saved.key), saved.checkpoint, saved.images.tobytes(), saved.probabilities.tobytes(), saved.split, saved.index


def read_export(path: Path) -> Any:
    found = resolve(path, kinds=("exported",))
    config, weights = safetensors_io.load_safetensors(path)
    return (found.config(), found.classes_sha256, found.stats().sha256, config,
            {name: tensor.numpy().tobytes() for name, tensor in weights.items()})


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("evaluation") / "saved", np.random.default_rng(1)
    images = np.zeros(20, predictions.IMAGE)
    images["id"], images["label"], images["probability"] = np.arange(20), 3, draw.random(20)
    key = predictions.Key("a" * 64, "b" * 64, "c" * 64, 20, 6, 10, "fp32")
    with predictions.writing(path, key, {"checkpoint": "run/step-1", "split": "val", "index": "index", "made": {}}) as append:
        append(images, draw.random((20, 6)).astype(np.float16))
    return path


@pytest.fixture(scope="module")
def export(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = load(write_recipe(folder, tiny_set.index))
    stats = Stats.for_index(SampleIndex.load(tiny_set.index), config.data.square_px)
    write_folder(folder / "out", config, AlexNet(config.model, seed=0), stats, About("Untrained."),
                 hashes={"classes_sha256": "d" * 64})
    return folder / "out"


@TIERS
def test_flips_in_a_checkpoint(tmp_path: Path, count: int, record_property: Record) -> None:
    original = save(tmp_path / "run", 7)
    expected, trials = read_checkpoint(original), Row("checkpoint: flips")
    for draw in trials.draws(count):
        fault = flip(original, tmp_path / "copy", draw)
        trials.trial(fault, lambda: read_checkpoint(tmp_path / "copy") == expected)
    trials.check(record_property)


@TIERS
def test_flips_in_an_evaluation(evaluation: Path, tmp_path: Path, count: int, record_property: Record) -> None:
    expected, trials = read_evaluation(evaluation), Row("evaluation: flips")
    for draw in trials.draws(count):
        fault = flip(evaluation, tmp_path / "copy", draw)
        trials.trial(fault, lambda: read_evaluation(tmp_path / "copy") == expected)
    trials.check(record_property)


@TIERS
def test_flips_in_an_exported_network(export: Path, tmp_path: Path, count: int, record_property: Record) -> None:
    expected, trials = read_export(export), Row("export: flips")
    for draw in trials.draws(count):
        fault = flip(export, tmp_path / "copy", draw, leave_out=("README.md",))  # the card is its owner's to edit
        trials.trial(fault, lambda: read_export(tmp_path / "copy") == expected)
    trials.check(record_property)


def forge(values: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy of JSON values with one of them, or its key, replaced."""
    copy = json.loads(json.dumps(values))
    where: Any = {"": copy}
    key: Any = ""
    while isinstance(where[key], (dict, list)) and where[key] and draw.random() < 0.9:
        where = where[key]
        key = draw.choice(sorted(where)) if isinstance(where, dict) else draw.randrange(len(where))
    value = draw.choice(FORGED)
    if isinstance(where, dict) and draw.random() < 0.3:
        old = where.pop(key)
        if draw.random() < 0.5:
            where[str(draw.choice(FORGED))] = old
        return copy if where is not copy or key else copy, f"{key} taken away"
    where[key] = value
    return (value if key == "" and where is not copy else copy), f"{key} = {value!r}"


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


@TIERS
def test_forged_checkpoints(tmp_path: Path, count: int, record_property: Record) -> None:
    """Right hashes, other values: refused in a line, or usable."""
    original, trials, copy = save(tmp_path / "run", 7), Row("checkpoint: forged"), tmp_path / "run/step-000000008"
    whole, state = FileSystemReader(original).read_metadata(), {
        **json.loads((original / "state.json").read_text()), "progress": {"epoch": 0, "images": 3, "errors": 1, "loss": 0.5},
        "loader": {"step": 7}, "schedule": {"drops": 0}, "metrics_bytes": 10, "sources": {"stats": "x"}, "classes": "x"}
    (original / "state.json").write_bytes(dump(state))
    checkpoint.write_manifest(original, [path.name for path in original.iterdir() if path.name != "manifest.json"])
    manifest = json.loads((original / "manifest.json").read_text())

    def use() -> bool:
        checkpoint.newest_good(copy.parent, lambda warning: None)
        checkpoint.best(copy.parent)
        read_checkpoint(copy)
        checkpoint.read_state(copy, whole=True)
        return True

    for draw in trials.draws(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        kind = draw.choice(("state", "manifest", "metadata"))
        if kind == "state":
            forged, fault = forge(state, draw)
            (copy / "state.json").write_bytes(dump(forged))
        elif kind == "metadata":
            place = draw.choice(sorted(vars(whole)))
            fault, changed = f"{place} forged", pickle.loads(pickle.dumps(whole))
            inner = getattr(changed, place)
            if isinstance(inner, dict) and inner and draw.random() < 0.8:
                entry = next(iter(inner.values()))
                name = draw.choice(sorted(vars(entry))) if hasattr(entry, "__dict__") else ""
                value = draw.choice([*FORGED, torch.Size([10 ** 9, 10 ** 9]), torch.Size([]), inner])
                fault = f"{place}.{name} = {str(value)[:40]}"
                object.__setattr__(entry, name, value) if name else inner.update(x=value)
            else:
                setattr(changed, place, draw.choice(FORGED))
            (copy / ".metadata").write_bytes(pickle.dumps(changed))
        if kind == "manifest":
            forged, fault = forge(manifest, draw)
            (copy / "manifest.json").write_bytes(dump(forged))
        else:
            checkpoint.write_manifest(copy, [path.name for path in copy.iterdir() if path.name != "manifest.json"])
        trials.trial(f"{kind}: {fault}", use)
    trials.check(record_property)


@TIERS
def test_forged_evaluations(evaluation: Path, tmp_path: Path, count: int, record_property: Record) -> None:
    trials, copy = Row("evaluation: forged"), tmp_path / "copy"
    manifest = json.loads((evaluation / "evaluation.json").read_text())
    del manifest["sha256"]

    def use() -> bool:
        saved = predictions.load(copy)
        predictions.find(copy, saved.key, lambda warning: None)
        return ensemble.member_result(saved).score.images == 20

    for draw in trials.draws(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(evaluation, copy)
        name = draw.choice(("", predictions.IMAGES, predictions.PROBABILITIES))
        if name:
            array: Any = draw.choice((np.zeros(0), np.zeros((20, 6)), np.zeros(3, "i4"), np.zeros((20, 7), "f2"), np.array("x")))
            np.save(copy / name, array)
            entries = file_entries(copy, (predictions.IMAGES, predictions.PROBABILITIES))
            forged, fault = {**manifest, "files": entries}, f"{name} {array.shape}"
        else:
            forged, fault = forge(manifest, draw)
        (copy / "evaluation.json").write_bytes(dump(with_own_hash(forged) if isinstance(forged, dict) else forged))
        trials.trial(fault, use)
    trials.check(record_property)


@TIERS
def test_forged_exports(export: Path, tmp_path: Path, count: int, record_property: Record) -> None:
    trials, copy = Row("export: forged"), tmp_path / "copy"
    packed = (export / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(packed[:8], "little")
    header, manifest = json.loads(packed[8:end]), json.loads((export / "manifest.json").read_text())

    def use() -> bool:
        read_export(copy)
        safetensors_io.from_pretrained(copy)
        return True

    for draw in trials.draws(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(export, copy)
        kind = draw.choice(("header", "config", "manifest"))
        if kind == "manifest":
            forged, fault = forge(manifest, draw)
            (copy / "manifest.json").write_bytes(dump(forged))
        else:
            if kind == "config":
                inner, fault = forge(json.loads(header["__metadata__"]["config"]), draw)
                forged = {**header, "__metadata__": {**header["__metadata__"], "config": json.dumps(inner)}}
            else:
                forged, fault = forge(header, draw)
            text = dump(forged)
            (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + packed[end:])
            safetensors_io.write_manifest(copy)
        trials.trial(f"{kind}: {fault}", use)
    trials.check(record_property)


@TIERS
def test_damaged_quarantines(tmp_path: Path, count: int, record_property: Record) -> None:
    """Lines that are none are passed over, whatever they are; those that are whole count."""
    trials, path = Row("quarantine.jsonl: flips, forged"), tmp_path / "quarantine.jsonl"
    lines = [{"id": id, "reason": "cannot be decoded"} for id in (3, 5, 8)]
    for draw in trials.draws(count):
        forged, fault = forge(draw.choice(lines), draw) if draw.random() < 0.5 else ([draw.choice(FORGED)], "a list")
        text = b"".join(dump(line) + b"\n" for line in (lines[0], draw.choice((forged, draw.choice(FORGED))), lines[2]))
        path.write_bytes(text)
        trials.trial(fault, lambda: Quarantine(9, path).ids >= {3, 8})
        damaged, fault = flipped(text, draw)
        path.write_bytes(damaged)
        trials.trial(fault, lambda: len(Quarantine(9, path).ids) < 6)
    trials.check(record_property)


@TIERS
def test_damaged_records_of_a_run(tmp_path: Path, count: int, record_property: Record) -> None:
    """What a report reads of config.yaml and the files of lines is what was written, or it names the file."""
    folder, trials = tmp_path / "run", Row("records of a run: damaged")
    config = load(write_recipe(tmp_path))
    original = tmp_path / "original/run"
    original.mkdir(parents=True)
    run_folder.write_config(original, config)
    run_folder.record_start(original, index="i" * 64, processes=1)
    metrics = run_folder.Metrics(original / run_folder.METRICS, True)
    for epoch in range(3):
        metrics.write("step", step=9 * epoch, epoch=epoch, lr=0.01, loss=2.0)
        metrics.write("epoch", epoch=epoch, step=9 * epoch + 9, lr=0.01, loss=1.5, error=0.5, images_per_s=99.0, waited=0.01,
                      waited_for={"read": 0.01}, seconds=9.0, validation={"images": 24, "top1": 0.5, "top5": 0.1, "loss": 1.0})
    metrics.write("test", split="val", views=10, step=27, images=24, top1=0.5, top5=0.1, loss=1.0)
    length = metrics.length()
    metrics.close()
    run_folder.note_changes(original, replace(config, train=replace(config.train, epochs=9)), 27, 3)
    run_folder.record_start(original, index="i" * 64, processes=1, resumed_at=27)
    save(original / run_folder.CHECKPOINTS, 27, 0.5, 3, metrics_bytes=length)
    shutil.copytree(original, folder)
    expected = read_run(folder)
    assert not expected.problems and len(expected.epochs) == 3 and expected.test and expected.extended
    for draw in trials.draws(count):
        fault = flip(original, folder, draw, leave_out=(run_folder.CHECKPOINTS,))

        def outcome() -> bool:
            found = read_run(folder)
            same = len(found.starts) == 2 and all(one.items() >= other.items()  # the name of the key crc32 may be another
                                                  for one, other in zip(found.starts, expected.starts))
            return bool(found.problems) or same and replace(found, starts=expected.starts) == expected

        trials.trial(fault, outcome)
    trials.check(record_property)


def test_exports_are_the_same_to_the_byte(export: Path, tiny_set: TinySet, tmp_path: Path) -> None:
    config = load(write_recipe(tmp_path, tiny_set.index))
    stats = Stats.for_index(SampleIndex.load(tiny_set.index), config.data.square_px)
    for number in range(3):
        write_folder(tmp_path / str(number) / "out", config, AlexNet(config.model, seed=0), stats, About("Untrained."), onnx=True)
    for path in (tmp_path / "0/out").iterdir():
        assert len({(tmp_path / str(number) / "out" / path.name).read_bytes() for number in range(3)}) == 1, path.name


def test_tensors_of_a_checkpoint_are_what_was_saved(tmp_path: Path) -> None:
    assert read_checkpoint(save(tmp_path, 7))[1] == [tensor.flatten().tolist() for tensor in tensors(7).values()]
