"""Saved evaluations: whole or absent, damaged in every way, of another test, of earlier versions."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.files import file_entries, with_own_hash, write_json
from pipeline.index.sample_index import SampleIndex
from tests.conftest import TinySet
from tests.helpers.evaluations import Means, val_loader
from train.evaluate.metrics import score
from train.evaluate.predict import evaluate, predict
from train.evaluate.predictions import (IMAGE, IMAGES, MANIFEST, PROBABILITIES, SCALE, DamagedEvaluation, Evaluation, Key,
                                        find, load, writing)

ABOUT = {"checkpoint": "runs/small/checkpoints/step-000000007", "split": "val", "index": "indexes/small",
         "made": {"device": "cpu", "torch": "2", "batch": 5}}
KEY = Key("a" * 64, "i" * 64, "c" * 64, 24, 6, 1, "fp32")


@pytest.fixture(scope="module")
def whole(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "evaluation"
    with val_loader(tiny_set, 5) as loader, writing(path, KEY, ABOUT) as append:
        predict(Means(), loader, 1, contextlib.nullcontext, append)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "one"))


def looked_for(base: Path, key: Key = KEY) -> tuple[Path, Evaluation | None, list[str]]:
    warnings: list[str] = []
    return *find(base, key, warnings.append), warnings


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_saved_is_what_the_network_gave(tiny_set: TinySet, whole: Path) -> None:
    saved = load(whole)
    assert saved.name == "small/step-000000007" and saved.labelled and not saved.tested and saved.key == KEY
    with val_loader(tiny_set, 5) as loader:
        counted = evaluate(Means(), loader, 1, contextlib.nullcontext)
        expected = torch.cat([Means()(next(loader.crops(batch.images, 1))).double().softmax(1) for batch in loader]).numpy()
    assert np.array_equal(saved.images["id"], SampleIndex.load(tiny_set.index).ids("val"))
    assert score(saved.images["place"], saved.images["probability"], 6) == counted, "to the bit, loss included"
    assert saved.probabilities.dtype == np.float16 and np.array_equal(saved.probabilities, (expected * SCALE).astype(np.float16))
    assert isinstance(saved.probabilities, np.memmap)
    path, again, warnings = looked_for(whole)
    assert again is not None and (path, again.folder, warnings) == (whole, whole, [])


def test_a_test_that_is_cut_off_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    """And what ended it comes through as it is."""
    saved = load(whole)
    with pytest.raises(OSError, match="cannot read"), writing(tmp_path / "new/one", KEY, ABOUT) as append:
        append(saved.images[:5], saved.probabilities[:5])
        assert not (tmp_path / "new/one").exists()
        raise OSError("cannot read the archive")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("file", [IMAGES, PROBABILITIES])
def test_any_flipped_bit_is_found(copy: Path, file: str) -> None:
    """And the damaged evaluation left alone."""
    data = (copy / file).read_bytes()
    for position in 3, 70, len(data) // 2, len(data) - 1:  # magic, header, rows
        (copy / file).write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1:])
        with pytest.raises(DamagedEvaluation, match=rf"evaluation file \(=.*{file}\) has SHA-256 .*; test again, with the"):
            load(copy)
    path, saved, warnings = looked_for(copy)
    assert path == copy.with_name("one-2") and saved is None
    assert len(warnings) == 1 and f"{file}) has SHA-256" in warnings[0] and warnings[0].endswith("; this test goes to one-2")


@pytest.mark.parametrize("file", [IMAGES, PROBABILITIES, MANIFEST])
def test_a_file_that_is_gone_or_cut_is_found(copy: Path, file: str) -> None:
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[:60])
    with pytest.raises(DamagedEvaluation, match=rf"evaluation file \(=.*{file}\)"):
        load(copy)
    (copy / file).unlink()
    with pytest.raises(DamagedEvaluation, match=rf"evaluation file \(=.*{file}\)"):
        load(copy)
    assert looked_for(copy)[:2] == (copy.with_name("one-2"), None)


def test_another_test_goes_beside_it(whole: Path, copy: Path) -> None:
    other = replace(KEY, checkpoint="b" * 64)
    path, saved, warnings = looked_for(copy, other)
    assert (path, saved) == (copy.with_name("one-2"), None)
    assert warnings == [f"evaluation (={copy}) is of another test: checkpoint aaaaaaaaaaaa… (here bbbbbbbbbbbb…); this test "
                        "goes to one-2"]
    path.mkdir()
    assert looked_for(copy, other)[0] == path, "an empty folder is free"
    rows = load(whole)
    with writing(path, other, ABOUT) as append:
        append(rows.images, rows.probabilities)
    for key, expected in (other, path), (KEY, copy):
        found = looked_for(copy, key)
        assert found[0] == expected and found[1] is not None and found[1].key == key
    assert looked_for(copy, replace(other, views=10))[0] == copy.with_name("one-3") and contents(copy) == contents(whole)


def test_of_two_that_write_the_same_the_first_wins(whole: Path, tmp_path: Path) -> None:
    rows = load(whole)
    with pytest.raises(RuntimeError, match=r"one\) is there already; give another name; then give the same"):
        with writing(tmp_path / "one", KEY, ABOUT) as append:
            shutil.copytree(whole, tmp_path / "one")
            append(rows.images, rows.probabilities)
    assert contents(tmp_path / "one") == contents(whole) and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_says_so_before_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"evaluation \(=.*one\) could not be written: .* the disk is full; make room"):
        with writing(tmp_path / "one", KEY, ABOUT):
            raise AssertionError("it has begun")
    assert not list(tmp_path.iterdir())


def test_labels_of_no_output_are_refused(copy: Path) -> None:
    """With right hashes."""
    images = np.load(copy / IMAGES)
    images["label"][3] = KEY.outputs
    np.save(copy / IMAGES, images)
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["sha256"]
    write_json(copy / MANIFEST, with_own_hash({**manifest, "files": file_entries(copy, (IMAGES, PROBABILITIES))}))
    with pytest.raises(DamagedEvaluation, match="images.npy.* holds labels that are none of 6; test again"):
        load(copy)


def test_another_format_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "format": 9}))
    for read in (lambda: load(copy), lambda: looked_for(copy)):
        with pytest.raises(ValueError, match=r"evaluation format \(=9 in .*evaluation.json\) must be 2, the one of this program"):
            read()


def test_evaluations_of_earlier_versions_load_when_they_are_finished(copy: Path) -> None:
    """They had checksums in their rows, and were written where they lie, with no hashes until the end."""
    assert IMAGE.names == ("id", "probability", "label", "place", "crc32", "spare")
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["sha256"]  # as in format 1
    manifest["format"] = 1
    assert manifest.keys() == {"format", "checkpoint", "split", "index", "facts", "made", "files"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert load(copy).key == KEY
    (copy / MANIFEST).write_text(json.dumps({**manifest, "files": None}))
    with pytest.raises(DamagedEvaluation, match=r"images.npy\) is not finished; test again"):
        load(copy)
