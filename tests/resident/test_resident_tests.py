"""Tests of tier resident: the bits of EvalLoader, decoded once; by one process, by two, killed, resumed, refused."""
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import TinySet
from tests.helpers.loaders import eval_loader, train_loader
from tests.helpers.recipes import write_recipe
from tests.helpers.resident_loader import filled, yuv_decoded
from tests.helpers.small_set import encode, photographs, picture, write_set
from tests.helpers.runs import here, inside, lines, pair

from pipeline.resident import yuv420 as yuv
from pipeline.loading.batch import Batch
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.reading.quarantine import SampleError
from pipeline.loading.eval_loader import EvalLoader
from pipeline.compute_stats import compute
from pipeline.stats import Stats, stats_path
from pipeline.resident.chain import ResidentChain
from pipeline.resident.ram_store import RamStore
from pipeline.decoding.decoder import Decoder
from pipeline.tiers import TIERS
from train.evaluate.__main__ import main as evaluate_main

COUNT, BATCH = 30, 4  # 8 batches, the last of 2
GARBAGE = encode(picture(0, 100, 100))[:1000]  # a header, and hardly anything after it


def pixels(mean: str = "image") -> DataConfig:
    return DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean=mean)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    return write_set(tmp_path_factory.mktemp("photos"), photographs(8), photographs(COUNT))


@pytest.fixture(scope="module")
def stats(photos: SampleIndex) -> Stats:
    return compute(photos, "train", 76)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What was decoded: the size of each batch that came out of a stream."""
    found: list[int] = []
    original = Decoder.__next__

    def decoded(decoder: Decoder) -> object:
        plan, pixels = original(decoder)
        found.append(len(plan.ids))
        return plan, pixels

    monkeypatch.setattr(Decoder, "__next__", decoded)
    yield found


def loader(index: SampleIndex, stats: Stats, folder: Path, resident: str = "rgb", *, memory: str = "ram", mean: str = "image",
           batch: int = BATCH, **options: object) -> EvalLoader:
    machine = LoaderConfig(threads=2, resident_folder=str(folder), resident_memory=memory)
    return eval_loader("resident", index, "val", pixels(mean), batch, stats, resident=resident, machine=machine,
                       **options)  # type: ignore[arg-type]


def equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.step == other.step and np.array_equal(one.ids, other.ids) and np.array_equal(one.epochs, other.epochs)
        assert one.images.dtype == torch.float32 and torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("mean", ["image", "image_center", "channel"])
@pytest.mark.parametrize("memory", ["ram", "gpu"])
def test_every_pass_gives_the_bits_of_a_test_loader_and_only_the_first_decodes(
        photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int], memory: str, mean: str) -> None:
    with eval_loader("archives", photos, "val", pixels(mean), BATCH, stats) as plain:
        expected = list(plain)
        views = [torch.stack(list(plain.crops(batch.images, 10))) for batch in expected]
    opened.clear()
    with loader(photos, stats, tmp_path, memory=memory, mean=mean) as test:
        assert len(test) == 8 and filled(test) == (0, COUNT)
        for number in range(3):
            equal(list(test), expected)
            assert filled(test) == (COUNT, COUNT) and sum(opened) == COUNT, f"pass {number}"
            test.close()
        batch, view = next(iter(test)), views[0]
        assert torch.equal(torch.stack(list(test.crops(batch.images, 10))), view)
        test.return_batch = False
        centre, labels = next(iter(test))
        assert torch.equal(centre, view[4]) and torch.equal(labels, batch.labels)
    with loader(photos, stats, tmp_path, memory=memory, mean=mean, batch=7) as test:  # a later run, other batches
        assert torch.equal(torch.cat([batch.images for batch in test]), torch.cat([batch.images for batch in expected]))
        assert sum(opened) == (COUNT if memory == "ram" else 2 * COUNT)


@pytest.mark.parametrize("memory", ["ram", "gpu"])
def test_yuv_squares_are_those_of_the_form_stored_or_not(photos: SampleIndex, stats: Stats, tmp_path: Path, memory: str) -> None:
    with eval_loader("archives", photos, "val", pixels(), 16, None) as plain:
        squares = {int(id): image.permute(2, 0, 1).contiguous() for batch in plain
                   for id, image in zip(batch.ids, batch.images, strict=True)}
    mean = torch.from_numpy(stats.mean_image_chw)
    with loader(photos, stats, tmp_path / "once", "yuv420", memory=memory, keep=False) as once, \
            loader(photos, stats, tmp_path, "yuv420", memory=memory) as test:
        first = list(test)
        for batch in first:
            for id, image in zip(batch.ids, batch.images, strict=True):
                assert torch.equal(image, yuv_decoded(yuv.encode(squares[int(id)]), 76).float() - mean)
        equal(list(test), first)
        equal(list(once), first)
        assert not (tmp_path / "once").exists()


def test_after_the_first_pass_nothing_is_read_and_the_file_is_complete(stats: Stats, tmp_path: Path, opened: list[int]) -> None:
    index = write_set(tmp_path, photographs(2), photographs(COUNT))
    folder = index.path / "resident"
    machine = LoaderConfig(threads=1)
    with eval_loader("resident", index, "val", pixels(), BATCH, stats, machine=machine) as test:
        expected = list(test)
        test.close()
        assert test.chain.store.sealed  # type: ignore[attr-defined]
    assert [path.suffix for path in sorted(folder.iterdir())] == [".lock", ".squares"]
    (tmp_path / "images.tar").unlink()
    with eval_loader("resident", SampleIndex.load(index.path), "val", pixels(), BATCH, stats, machine=machine) as test:
        equal(list(test), expected)
        assert "decode" not in test.monitor.spans and test.note == "" and sum(opened) == COUNT


def test_a_split_that_is_tested_once_fills_nothing(photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int]) -> None:
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats) as plain:
        expected = list(plain)
    for memory in ("ram", "gpu"):
        with loader(photos, stats, tmp_path / "none", memory=memory, keep=False) as once:
            equal(list(once), expected)
            equal(list(once), expected)
    assert not (tmp_path / "none").exists() and sum(opened) == 5 * COUNT


def test_ranks_share_the_batches_and_one_file(photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int]) -> None:
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats) as plain:
        expected = list(plain)
    for memory in ("ram", "gpu"):
        opened.clear()
        parts = [loader(photos, stats, tmp_path, memory=memory, shard=(rank, 3)) for rank in range(3)]
        assert [len(part) for part in parts] == [3, 3, 2]
        for _ in range(2):
            equal(sorted((batch for part in parts for batch in part), key=lambda batch: batch.step), expected)
        assert sum(opened) == COUNT
        for rank, part in enumerate(parts):
            part.close()
            own = len(np.concatenate([batch.ids for batch in expected[rank::3]]))
            assert filled(part) == ((COUNT, COUNT) if memory == "ram" else (own, own))
        with loader(photos, stats, tmp_path, memory=memory, shard=(8, 9)) as none:
            assert len(none) == 0 and list(none) == []


def test_some_samples_in_any_order(photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int]) -> None:
    ids = photos.ids("val")[[20, 3, 4, 19, 7, 3]]
    for memory in ("ram", "gpu"):
        with eval_loader("archives", photos, "val", pixels(), 4, stats, ids=ids) as plain, \
                loader(photos, stats, tmp_path, memory=memory, ids=ids) as test:
            expected = list(plain)
            opened.clear()
            for _ in range(2):
                equal(list(test), expected)
            assert sum(opened) == 5 and len(test) == 2
    with pytest.raises(ValueError, match=r"ids \(=1 samples\) must be of split val, whose images are kept"):
        loader(photos, stats, tmp_path, ids=photos.ids("train")[:1])


@pytest.mark.parametrize("memory", ["ram", "gpu"])
def test_an_unreadable_image_is_an_error_in_every_pass_and_what_was_decoded_stays(
        stats: Stats, tmp_path: Path, opened: list[int], memory: str) -> None:
    blobs = photographs(12)
    blobs[9] = GARBAGE
    index = write_set(tmp_path, photographs(2), blobs)
    bad = int(index.ids("val")[9])
    with loader(index, stats, tmp_path / "squares", memory=memory) as test:
        for _ in range(2):
            seen = []
            with pytest.raises(SampleError, match=rf"sample {bad} \(=val_0009.JPEG in .*\) cannot be decoded"):
                for batch in test:
                    seen.append(batch.step)
            assert seen == [0, 1]
        assert filled(test)[0] == 8 and opened == [4, 4]
    with eval_loader("archives", index, "val", pixels(), BATCH, stats, skip_corrupt=True) as plain, \
            loader(index, stats, tmp_path / "squares", memory=memory, skip_corrupt=True) as test:
        expected = list(plain)
        opened.clear()
        for _ in range(3):
            equal(list(test), expected)
            assert test.skipped == plain.skipped and set(test.skipped) == {bad}
        assert filled(test) == (11, 12) and sum(opened) == (3 if memory == "ram" else 11)
        test.close()
        assert memory == "gpu" or test.chain.store.sealed  # type: ignore[attr-defined]


def test_a_pass_left_in_the_middle_and_taken_up_again(photos: SampleIndex, stats: Stats, tmp_path: Path,
                                                      opened: list[int]) -> None:
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats) as plain:
        expected = list(plain)
    opened.clear()
    with loader(photos, stats, tmp_path) as test:
        for batch in test:
            if batch.step == 2:
                break
        test.close()
        done = filled(test)[0]
        assert 3 * BATCH <= done < COUNT
        with pytest.raises(RuntimeError, match="this loader was closed, or iterated anew, while its batches were being taken"):
            one, other = iter(test), iter(test)
            next(one)
            next(other)
            list(one)
        equal(list(test), expected)
        assert sum(opened) < 2 * COUNT and filled(test)[0] == COUNT
        opened.clear()
        equal(list(test), expected)
        assert not opened


def test_training_and_tests_share_a_splits_file(photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int]) -> None:
    machine = LoaderConfig(threads=1, resident_folder=str(tmp_path))
    with train_loader("resident", photos, "val", pixels(), 6, 7, stats, machine=machine) as train:
        train.fill()
    opened.clear()
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats) as plain, loader(photos, stats, tmp_path) as test:
        equal(list(test), list(plain))
        assert sum(opened) == COUNT  # the plain one's


def fill(rank: int, index: Path, folder: Path, gate: "multiprocessing.synchronize.Barrier",
         dying: "multiprocessing.synchronize.Event") -> None:
    """A process that fills all it can, and keeps what it saw. The first one dies at its fourth batch; till then the other one
    is at its first, lest nothing be left to do."""
    put, done = RamStore.put, itertools.count(1)

    def mortal(store: RamStore, places: Any, squares: torch.Tensor) -> None:
        put(store, places, squares)
        if rank == 1:
            dying.wait()
        elif next(done) == 4:
            dying.set()
            os._exit(9)

    RamStore.put = mortal  # type: ignore[method-assign]
    photos = SampleIndex.load(index)
    with loader(photos, Stats.for_index(photos, 76), folder) as test:
        gate.wait()
        images = [torch.cat([batch.images for batch in test]) for _ in range(2)]
    torch.save(images, folder / f"rank{rank}.pt")


def test_processes_fill_one_file_at_once_though_one_is_killed(photos: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    stats.save(stats_path(photos.path, 76))
    spawn = multiprocessing.get_context("spawn")
    gate, dying = spawn.Barrier(2), spawn.Event()
    processes = [spawn.Process(target=fill, args=(rank, photos.path, tmp_path, gate, dying)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [9, 0]
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats) as plain:
        expected = torch.cat([batch.images for batch in plain])
    assert all(torch.equal(images, expected) for images in torch.load(tmp_path / "rank1.pt"))
    with loader(photos, stats, tmp_path) as test:
        assert filled(test) == (COUNT, COUNT) and test.chain.store.sealed  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused_naming_the_split(photos: SampleIndex, stats: Stats, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.resident.capacity.memory", lambda: (500_000, "the machine's memory"))
    for memory in ("ram", "gpu"):
        with pytest.raises(RuntimeError) as caught:
            loader(photos, stats, tmp_path, memory=memory)
        assert str(caught.value) == ("split val, whose squares tests keep in memory: data.resident (=rgb) needs 0.5 MB for 30 "
                                     "squares, and of the machine's memory (0.5 MB) 0.5 MB may be used; use data.resident: "
                                     "yuv420 (half as much, 0.3 MB, fits), or data.tier: packed")
        with loader(photos, stats, tmp_path, memory=memory, keep=False) as once:  # decodes
            assert len(list(once)) == 8
    with pytest.raises(ValueError, match=r"data.resident \(=cmyk\) must be one of rgb, yuv420"):
        loader(photos, stats, tmp_path, "cmyk")
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"split val, .*: resident store: .*folder.* lies below a file, which is no folder"):
        loader(photos, stats, tmp_path / "file" / "folder")


def test_the_tier_chooses(photos: SampleIndex, stats: Stats, tmp_path: Path) -> None:
    machine = LoaderConfig(threads=1, resident_folder=str(tmp_path))
    for tier in TIERS:
        made = eval_loader(tier, photos, "val", pixels(), BATCH, stats, machine=machine, shard=(1, 2))
        assert len(made) == 4 and isinstance(made.chain, ResidentChain) == (tier == "resident")
    assert [json.loads(path.read_bytes()[:4095])["split"] for path in tmp_path.glob("*.squares")] == ["val"]
    with pytest.raises(ValueError, match=r"tier \(=tape\) must be one of archives"):
        eval_loader("tape", photos, "val", pixels(), BATCH, stats)


def scores(folder: Path) -> list[dict[str, Any]]:
    """Of every epoch's validation, and of the test."""
    return [line.get("validation") or line for line in lines(folder) if line["kind"] in ("epoch", "test")]


@pytest.fixture
def tested(tiny_set: TinySet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of split val that were decoded, batch by batch."""
    found: list[int] = []
    original, ids = Decoder.__next__, SampleIndex.load(tiny_set.index).ids("val")

    def decoded(decoder: Decoder) -> object:
        plan, given = original(decoder)
        found.append(int(np.isin(plan.ids, ids).sum()))
        return plan, given

    monkeypatch.setattr(Decoder, "__next__", decoded)
    return found


@pytest.mark.parametrize("memory", ["ram", "gpu"])
@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_a_run_decodes_each_split_once_and_evaluate_agrees(tiny_set: TinySet, tmp_path: Path, tested: list[int], kind: str,
                                                           memory: str) -> None:
    recipe = write_recipe(tmp_path, tiny_set.index)
    squares = tmp_path / "squares"
    more = ["--data.tier=resident", f"--data.resident={kind}", f"--machine.resident_folder={squares}", "--train.epochs=2",
            f"--machine.resident_memory={memory}"]
    here(recipe, tmp_path, "--machine.name=resident", *more)
    assert sum(tested) == 24
    if kind == "rgb":
        here(recipe, tmp_path, "--machine.name=archives", "--train.epochs=2")
        assert sum(tested) == 4 * 24 and scores(tmp_path / "archives") == scores(tmp_path / "resident")
    here(recipe, tmp_path, "--machine.name=cut", "--machine.stop_after=11", *more, code=75)
    here(recipe, tmp_path, "--machine.name=cut", "--resume", *more)
    assert scores(tmp_path / "cut") == scores(tmp_path / "resident")
    tested.clear()
    shutil.rmtree(tmp_path / "resident" / "evaluations", ignore_errors=True)  # it would answer from what it saved
    out, _ = inside(evaluate_main, ["--run", str(tmp_path / "resident"), "--json"], 0)
    found, told = json.loads(out), scores(tmp_path / "resident")[-1]
    assert {key: found[key] for key in ("top1_errors", "top5_errors", "loss")} == {key: told[key] for key in (
        "top1_errors", "top5_errors", "loss")}
    assert sum(tested) == 24 and squares.exists() == (memory == "ram")


def test_a_pair_of_towers_tests_the_same_squares(tiny_set: TinySet, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_set.index)
    pair(recipe, tmp_path, "--machine.name=two", "--data.tier=resident", f"--machine.resident_folder={tmp_path / 'squares'}",
         "--train.epochs=2")
    here(recipe, tmp_path, "--machine.name=one", "--train.epochs=2")
    for two, one in zip(scores(tmp_path / "two"), scores(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)  # towers add up in another order
        assert two["top1_errors"] == one["top1_errors"]


def test_squares_that_do_not_fit_are_refused_before_the_run_begins(tiny_set: TinySet, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((10 ** 18, 0))  # for the training split, for val
    monkeypatch.setattr("pipeline.resident.capacity.free_bytes", lambda folder: next(free))
    _, err = here(write_recipe(tmp_path, tiny_set.index), tmp_path, "--data.tier=resident",
                  f"--machine.resident_folder={tmp_path / 'squares'}", code=4)
    assert err.startswith("error: split val, whose squares tests keep in memory: data.resident (=rgb) needs 0.4 MB more in ")
    assert not (tmp_path / "small").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", ["ram", "gpu"])
@pytest.mark.parametrize("kind", ["rgb", "yuv420"])
def test_on_a_gpu(photos: SampleIndex, stats: Stats, tmp_path: Path, opened: list[int], kind: str, memory: str) -> None:
    with eval_loader("archives", photos, "val", pixels(), BATCH, stats, device="cuda") as plain, \
            loader(photos, stats, tmp_path, kind, memory=memory, device="cuda") as test:
        expected = [batch.images for batch in plain]
        opened.clear()
        first = list(test)
        for _ in range(2):
            equal(list(test), first)
        assert sum(opened) == COUNT
        for batch, images in zip(first, expected, strict=True):
            assert batch.images.device == batch.labels.device == torch.device("cuda", 0)
            difference = (batch.images - images).abs()
            # Drawn pictures: colour as fine as brightness, which 4:2:0 planes lose. On CPUs the mean is 9.6 grey levels as well.
            assert difference.max() <= 1.01 if kind == "rgb" else difference.mean() < 12
