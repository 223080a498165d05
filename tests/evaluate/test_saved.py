"""Saved evaluations: cut off after every batch, damaged in every way, of another test, written by several processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import TestLoader
from pipeline.stats import Stats
from tests.conftest import TinySet
from tests.helpers.checkpoints import ALONE
from tests.helpers.runs import processes
from tests.evaluate.test_evaluate import PIXELS, Means
from train.evaluate import predictions as saved
from train.evaluate.probabilities import SCALE, Facts, Made, Memory, intact, packed
from train.evaluate.predictions import DamagedEvaluation, Folder, claim, load
from train.evaluate.metrics import scored
from train.evaluate.predict import each_batch, evaluate

BATCH = 5  # 24 images: 5 batches, the last of 4
MADE = Made("cpu", "2", BATCH)
ABOUT = {"checkpoint": "runs/small/checkpoints/step-000000007", "split": "val", "index": "indexes/small"}


class Cut(Exception):
    """What ends a test in the middle."""


@pytest.fixture(scope="module")
def index(tiny_set: TinySet) -> SampleIndex:
    return SampleIndex.load(tiny_set.index)


def facts_of(index: SampleIndex, checkpoint: str = "a" * 64) -> Facts:
    return Facts(checkpoint, index.split_sha256("val"), "c" * 64, len(index.ids("val")), 6, 1, "fp32")


def claimed(base: Path, index: SampleIndex, facts: Facts | None = None, made: Made = MADE) -> tuple[Path, bool, list[str]]:
    told: list[str] = []
    ids = index.ids("val")
    path, whole, handle = claim(base, facts or facts_of(index), made, ids, index.samples["label"][ids], ABOUT, told.append)
    os.close(handle)
    return path, whole, told


def fill(store: Folder | Memory, index: SampleIndex, batches: int = 99) -> int:
    """Test what remains, but no more than so many batches; how many images that was, or Cut."""
    remaining = store.remaining(BATCH)
    left = batches

    def take(batch: object, probabilities: torch.Tensor) -> None:
        nonlocal left
        if not left:
            raise Cut
        left -= 1
        store.take(batch.ids, batch.labels, probabilities)  # type: ignore[attr-defined]

    with TestLoader(index, "val", PIXELS, BATCH, Stats.for_index(index, 76), machine=LoaderConfig(threads=1),
                    ids=remaining) as loader:
        each_batch(Means(), loader, 1, contextlib.nullcontext, take)
    store.finish(ALONE)
    return len(remaining)


@pytest.fixture(scope="module")
def whole(index: SampleIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    path, done, told = claimed(tmp_path_factory.mktemp("whole") / "evaluation", index)
    assert not done and told == []
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        assert fill(folder, index) == 24
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_what_is_saved_is_what_the_network_gave(index: SampleIndex, whole: Path) -> None:
    found = load(whole)
    assert found.name == "small/step-000000007" and found.labelled and not found.tested
    stats = Stats.for_index(index, 76)
    with TestLoader(index, "val", PIXELS, BATCH, stats, machine=LoaderConfig(threads=1)) as loader:
        score = evaluate(Means(), loader, 1, contextlib.nullcontext)
        expected = torch.cat([Means()(next(loader.views(batch.images, 1))).double().softmax(1) for batch in loader]).numpy()
    assert np.array_equal(found.images["id"], index.ids("val"))
    assert scored(found.images["place"], found.images["probability"], 6) == score, "to the bit, loss included"
    assert found.probabilities.dtype == np.float16 and np.array_equal(found.probabilities, (expected * SCALE).astype(np.float16))
    memory = Memory(index.ids("val"), index.samples["label"][index.ids("val")], 6)
    assert fill(memory, index) == 24
    assert np.array_equal(memory.images, found.images) and np.array_equal(memory.probabilities, found.probabilities)


@pytest.mark.parametrize("cut", range(5))
def test_cut_off_after_any_batch_it_goes_on_to_the_same_bytes(index: SampleIndex, whole: Path, tmp_path: Path, cut: int) -> None:
    path, _, _ = claimed(tmp_path / "one", index)
    with contextlib.closing(Folder(path, index.ids("val"))) as folder, pytest.raises(Cut):
        fill(folder, index, cut)
    with pytest.raises(ValueError, match=r"evaluation \(=.*one\) is not finished; give the command that began it again"):
        load(path)
    assert claimed(path, index) == (path, False, [])
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        assert fill(folder, index) == 24 - 5 * cut
    assert contents(path) == contents(whole)
    assert claimed(path, index) == (path, True, [])


def test_a_batch_cut_in_the_middle_is_tested_whole(index: SampleIndex, whole: Path, tmp_path: Path) -> None:
    """Rows of which one array reached the disk and the other did not, as after a power failure."""
    path = Path(shutil.copytree(whole, tmp_path / "one"))
    text = json.loads((path / saved.MANIFEST).read_text())
    (path / saved.MANIFEST).write_text(json.dumps({**text, "files": None}))
    probabilities = np.load(path / saved.PROBABILITIES, mmap_mode="r+")
    probabilities[7] = 0
    del probabilities
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        assert folder.remaining(BATCH).tolist() == index.ids("val")[5:10].tolist()
        assert fill(folder, index) == 5
    assert load(path).facts == load(whole).facts
    for name in (saved.IMAGES, saved.PROBABILITIES):
        assert (path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("file", [saved.IMAGES, saved.PROBABILITIES])
def test_any_flipped_bit_is_found_and_mended(index: SampleIndex, whole: Path, tmp_path: Path, file: str) -> None:
    size = (whole / file).stat().st_size
    start = np.load(whole / file, mmap_mode="r").offset
    for place, tested in (3, 24), (70, 24), (start, 5), (start + (size - start) // 3, 5), (size - 1, 4):  # magic, header, rows
        path = Path(shutil.copytree(whole, tmp_path / f"{place}"))
        data = bytearray((path / file).read_bytes())
        data[place] ^= 4
        (path / file).write_bytes(data)
        with pytest.raises(DamagedEvaluation, match=rf"evaluation file \(=.*{file}\) is not the one that was written"):
            load(path)
        found, done, told = claimed(path, index)
        assert (found, done) == (path, False)
        assert "is not the one that was written (its size or SHA-256 differs); what is damaged is tested again" in told[0]
        with contextlib.closing(Folder(path, index.ids("val"))) as folder:
            assert fill(folder, index) == tested, place
        assert contents(path) == contents(whole), place


def test_a_file_that_is_gone_or_cut_is_begun_anew(index: SampleIndex, whole: Path, tmp_path: Path) -> None:
    for name in (saved.IMAGES, saved.PROBABILITIES, saved.MANIFEST):
        for spoil in (Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:60])):
            path = Path(shutil.copytree(whole, tmp_path / "one"))
            spoil(path / name)
            with pytest.raises((DamagedEvaluation, ValueError)):
                load(path)
            assert claimed(path, index)[1] is False
            with contextlib.closing(Folder(path, index.ids("val"))) as folder:
                assert fill(folder, index) == 24
            assert contents(path) == contents(whole)
            shutil.rmtree(path)


def test_another_test_goes_beside_it(index: SampleIndex, whole: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(whole, tmp_path / "one"))
    other = facts_of(index, "b" * 64)
    path, done, told = claimed(base, index, other)
    assert (path, done) == (tmp_path / "one-2", False)
    assert told == [f"evaluation (={base}) is of another test: checkpoint aaaaaaaaaaaa… (here bbbbbbbbbbbb…); this one goes to "
                    "one-2"]
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        fill(folder, index)
    assert claimed(base, index, other)[:2] == (path, True) and claimed(base, index)[:2] == (base, True)
    assert claimed(base, index, replace(other, views=10))[0] == tmp_path / "one-3" and contents(base) == contents(whole)


def test_a_part_made_otherwise_is_begun_anew_and_a_whole_is_not(index: SampleIndex, whole: Path, tmp_path: Path) -> None:
    path, _, _ = claimed(tmp_path / "one", index)
    with contextlib.closing(Folder(path, index.ids("val"))) as folder, pytest.raises(Cut):
        fill(folder, index, 2)
    _, _, told = claimed(path, index, made=Made("gpu", "2", 7))
    assert told == [f"evaluation (={path}) was begun with device cpu (here gpu), batch 5 (here 7), which may change last bits; "
                    "it is begun anew"]
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        assert len(folder.remaining(7)) == 24
    assert claimed(Path(shutil.copytree(whole, tmp_path / "two")), index, made=Made("gpu", "2", 7))[1:] == (True, [])


def test_two_processes_do_not_make_the_same(index: SampleIndex, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    handle = os.open(tmp_path / "one", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match=r"evaluation \(=.*one\) is being made by another process; wait for it, or name"):
        claimed(tmp_path / "one", index)
    os.close(handle)
    assert claimed(tmp_path / "one", index)[1] is False


def test_a_full_disk_says_so_before_the_test(index: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(saved.NotSaved, match=r"evaluation \(=.*one\) could not be written \(No space left on device\); mend"):
            claimed(tmp_path / "one", index)
    assert list((tmp_path / "one").iterdir()) == []
    assert claimed(tmp_path / "one", index)[1] is False
    with contextlib.closing(Folder(tmp_path / "one", index.ids("val"))) as folder:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(saved.NotSaved, match="No space left on device"):
            fill(folder, index)


def test_another_format_is_refused(index: SampleIndex, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "one"))
    text = json.loads((path / saved.MANIFEST).read_text())
    (path / saved.MANIFEST).write_text(json.dumps({**text, "format": 9}))
    for read in (lambda: load(path), lambda: claimed(path, index)):
        with pytest.raises(ValueError, match=r"evaluation format \(=9 in .*evaluation.json\) must be 1, the one of this program"):
            read()


def test_an_image_that_was_not_tested_is_found(index: SampleIndex, tmp_path: Path) -> None:
    path, _, _ = claimed(tmp_path / "one", index)
    with contextlib.closing(Folder(path, index.ids("val"))) as folder:
        with pytest.raises(RuntimeError, match=r"images tested \(=0, in .*one\) must be all 24 of the split"):
            folder.finish(ALONE)


def test_rows_of_a_batch_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.75 - 1e-12, 1e-12], [1.0, 0.0, 0.0]], dtype=torch.float64)
    rows, halves = packed(np.array([7, 8]), torch.tensor([2, -1]), probabilities)
    assert rows["id"].tolist() == [7, 8] and rows["place"].tolist() == [2, -1] and rows["probability"][0] == 1e-12
    assert np.isnan(rows["probability"][1]) and halves[1].tolist() == [32768.0, 0.0, 0.0]
    assert halves[0, 2] / SCALE == pytest.approx(1e-12, rel=0.5), "plain float16 has nothing below 6e-8"
    assert intact(rows, halves).all()
    halves[0, 0] = 0
    assert intact(rows, halves).tolist() == [False, True]


SHARED = """
import sys, warnings
warnings.simplefilter("error")
from dataclasses import replace
from pathlib import Path
import torch
from torch.distributed.device_mesh import init_device_mesh
import contextlib
from pipeline.config import LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import TestLoader
from pipeline.stats import Stats
from tests.evaluate.test_evaluate import PIXELS, Means
from tests.evaluate.test_saved import BATCH, claimed, contents
from train.config import ParallelConfig
from train.parallel.topology import process_group
from train.evaluate.probabilities import Memory
from train.evaluate.predictions import Folder
from train.evaluate.predict import each_batch

index, whole, path = SampleIndex.load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ids = index.ids("val")
torch.set_num_threads(1)
with process_group(towers=2, parallel=ParallelConfig(towers=1), device="cpu", timeout_s=60) as where:
    for memory in (False, True):
        if where.is_main and not memory:
            claimed(path, index)
        where.any_rank(False)
        store = Memory(ids, index.samples["label"][ids], 6) if memory else Folder(path, ids)
        with TestLoader(index, "val", PIXELS, BATCH, Stats.for_index(index, 76), machine=LoaderConfig(threads=1),
                        shard=(where.data_rank, where.data_ranks), ids=store.remaining(BATCH)) as loader:
            each_batch(Means(), loader, 1, contextlib.nullcontext, lambda batch, p: store.take(batch.ids, batch.labels, p),
                       where=where)
        images, probabilities = store.finish(where)
        store.close()
        if where.is_main:
            assert contents(path) == contents(whole)
            assert images.tobytes() == (whole / "images.npy").read_bytes()[-images.nbytes:]
            assert probabilities.tobytes() == (whole / "probabilities.npy").read_bytes()[-probabilities.nbytes:]
    print("done")
"""


def test_several_processes_write_the_same_bytes(tiny_set: TinySet, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHARED, encoding="utf-8")
    processes(3, script, tiny_set.index, whole, tmp_path / "one")
