"""`make_train_loader` and `make_eval_loader` as a library's users call them."""
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline import Batch, DataConfig, SampleIndex, make_eval_loader, make_train_loader
from pipeline.compute_stats import compute, find_or_compute
from pipeline.index.writer import mark_excluded
from pipeline.process_pool import Progress
from pipeline.stats import Stats, stats_path
from tests.helpers.runs import ROOT
from tests.helpers.small_set import photographs, write_set

SMALL = DataConfig(square_px=76, crop_px=67)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    index = write_set(tmp_path_factory.mktemp("photos"), photographs(23), photographs(30)[23:])
    compute(index, "train", 76, out=stats_path(index.path, 76))
    return index


def test_a_path_is_enough_and_statistics_are_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = write_set(tmp_path, photographs(13), photographs(16)[13:])
    with make_train_loader(str(index.path), batch_size=4, data=SMALL) as loader:
        assert len(loader) == 4
        pairs = list(loader)
        assert len(pairs) == 4 and loader.epoch == 1 and len(loader) == 3  # the fourth batch held three images of this epoch
        images, labels = pairs[0]
        assert images.shape == (4, 3, 67, 67) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert "statistics: 100% of 0.2 MB, 13 images" in capsys.readouterr().err
    written = stats_path(index.path, 76).stat().st_mtime_ns
    with make_eval_loader(index.path, batch_size=2, data=SMALL) as loader:
        assert [len(labels) for _, labels in loader] == [2, 1] and len(loader) == 2
    assert capsys.readouterr().err == "" and stats_path(index.path, 76).stat().st_mtime_ns == written
    mark_excluded(index, {3: ("x", "gone")})  # other images: their statistics take the place of the old ones
    make_train_loader(index.path, batch_size=4, data=SMALL)
    assert Stats.load(stats_path(index.path, 76)).count == 12


def test_what_needs_no_statistics_computes_none(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(4), photographs(5)[4:])
    with make_train_loader(index, batch_size=2, data="imagenet") as train, make_eval_loader(index, data="imagenet") as test:
        assert next(train)[0].shape == (2, 3, 224, 224) and next(iter(test))[0].shape == (1, 3, 224, 224)
    assert not list(index.path.glob("stats*"))


def test_of_several_that_need_statistics_one_computes(tmp_path: Path) -> None:
    class Recorded(Progress):
        stages: list[str] = []

        def expect(self, stage: str, total: int) -> None:
            self.stages.append(stage)

    index = write_set(tmp_path, photographs(5))
    threads = [threading.Thread(target=find_or_compute, args=(index, 76), kwargs={"progress": Recorded()}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Recorded.stages == ["statistics"] and Stats.for_index(index, 76).count == 5


def test_pairs_and_batches_are_the_same_images(photos: SampleIndex) -> None:
    options: dict[str, Any] = {"batch_size": 6, "data": SMALL, "seed": 3}
    with make_train_loader(photos, **options) as pairs, make_train_loader(photos, return_batch=True, **options) as batches:
        for (images, labels), batch in zip(pairs, batches):
            assert isinstance(batch, Batch) and torch.equal(images, batch.images) and torch.equal(labels, batch.labels)
            assert labels.tolist() == (batch.ids % 5).tolist() and batch.epochs.max() <= 1
    archive = photos.archives[0].path
    assert batch.paths == [f"{archive}/train_{id:04d}.JPEG" for id in batch.ids] == [batches.path(id) for id in batch.ids]
    del options["seed"]
    with make_eval_loader(photos, **options) as pairs, make_eval_loader(photos, return_batch=True, **options) as batches:
        for (images, labels), batch in zip(pairs, batches):
            assert torch.equal(images, next(batches.crops(batch.images, 1))) and batch.images.shape[-1] == 76
            assert images.is_contiguous() and not next(batches.crops(batch.images, 1)).is_contiguous()
            assert torch.equal(labels, batch.labels)


def test_the_state_of_one_loader_goes_on_in_another(photos: SampleIndex) -> None:
    with make_train_loader(photos, batch_size=6, data=SMALL, return_batch=True) as loader:
        ids = [next(loader).ids for _ in range(3)]
        state = loader.state_dict()
        ids += [batch.ids for batch in loader]
    parts = [make_train_loader(photos, batch_size=6, data=SMALL, return_batch=True, shard=(rank, 2)) for rank in range(2)]
    for part in parts:
        part.load_state_dict(state)
    assert np.array_equal(np.concatenate([next(part).ids for part in parts]), ids[3])
    for part in parts:
        part.close()
    with pytest.raises(ValueError, match=r"loader state seed \(=0\) must equal this loader's \(=1\); make the loader with"):
        make_train_loader(photos, batch_size=6, data=SMALL, seed=1).load_state_dict(state)


def test_the_shard_is_that_of_torch_distributed(photos: SampleIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        with make_train_loader(photos, batch_size=6, data=SMALL, return_batch=True) as loader:
            assert loader.sampler.shard == (1, 2) and len(next(loader).ids) == 3
        with make_eval_loader(photos, batch_size=3, data=SMALL, return_batch=True) as test:
            assert len(test) == 1 and next(iter(test)).ids.tolist() == [26, 27, 28]
        assert make_train_loader(photos, batch_size=6, data=SMALL, shard=(0, 1)).sampler.shard == (0, 1)
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"shard \(=None\) is not known: a launcher has started 2 processes \(WORLD_SIZE\)"):
        make_train_loader(photos, batch_size=6, data=SMALL)
    with pytest.raises(ValueError, match=r"shard \(=None\) is not known"):
        make_eval_loader(photos, data=DataConfig(square_px=80, crop_px=67))
    assert not stats_path(photos.path, 80).exists()  # refused before anything is computed


@pytest.mark.parametrize("options, kind, message", [
    ({"batch": 6}, TypeError, "argument batch of make_train_loader is not known; use batch_size"),
    ({"device_id": 0}, TypeError, "argument device_id of make_train_loader is not known; use device"),
    ({"num_workers": 2}, TypeError, r"argument num_workers .*; use machine=LoaderConfig\(threads=N\)"),
    ({"pin": True}, TypeError, "argument pin of make_train_loader is not known; it has index, split, batch_size"),
    ({}, ValueError, r"batch_size \(=128\) must not exceed the 23 samples of the split; lower it"),
    ({"batch_size": 0}, ValueError, r"batch_size \(=0\) must be at least 1"),
    ({"batch_size": 5, "shard": (0, 2)}, ValueError, r"batch_size \(=5\) must be divisible by the 2 ranks that share it"),
    ({"split": "valid"}, ValueError, r"split \(=valid\) is not in the index .*; it has train, val"),
    ({"tier": "tape"}, ValueError, r"tier \(=tape\) must be one of archives, packed"),
    ({"tier": "packed"}, ValueError, r"tier \(=packed\) needs packed images"),
    ({"data": "resnet"}, ValueError, r"preset \(=resnet\) must be one of alexnet, imagenet"),
    ({"data": 224}, TypeError, r"data \(=224\) must be a DataConfig or a text"),
    ({"batch_size": "8"}, TypeError, r"batch_size \(='8'\) must be a whole number"),
    ({"batch_size": True}, TypeError, r"batch_size \(=True\) must be a whole number"),
    ({"seed": "x"}, TypeError, r"seed \(='x'\) must be a whole number"),
    ({"seed": -1}, ValueError, r"seed \(=-1\) must be in \[0, 2\*\*63\); choose another"),
    ({"return_batch": 1}, TypeError, r"return_batch \(=1\) must be True or False"),
    ({"shard": 2}, TypeError, r"shard \(=2\) must be a tuple of numbers or None"),
    ({"shard": ()}, ValueError, r"shard \(=\(\)\) must be \(k, n\) with 0 <= k < n; pass"),
    ({"shard": (0, 1, 2)}, ValueError, r"must be \(k, n\) with 0 <= k < n; pass"),
    ({"machine": {}}, TypeError, r"machine \(={}\) must be a LoaderConfig"),
    ({"device": "meta"}, ValueError, r"device \(=meta\) must be cpu or cuda"),
    ({"device": "gpu"}, ValueError, r"device \(=gpu\) must be cpu or cuda"),
    pytest.param({"device": "cuda"}, ValueError, r"device \(=cuda\) is not there: torch .* sees 0 CUDA GPUs; use device=",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
])
def test_mistakes_are_named_as_arguments(photos: SampleIndex, options: dict[str, Any], kind: type[Exception],
                                         message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        make_train_loader(photos, **{"data": SMALL, **options})
    assert "recipe" not in str(error.value).replace("in a recipe: as data.packed", "")


def test_an_index_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index \(=.*nothing\) does not exist; make one with"):
        make_eval_loader(tmp_path / "nothing")
    with pytest.raises(TypeError, match="argument batch of make_eval_loader is not known; use batch_size"):
        make_eval_loader(tmp_path / "nothing", batch=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("options, message", [
    ({"shard": []}, r"must be \(k, n\) with"), ({"shard": (2, 2)}, r"must be \(k, n\) with"),
    ({"ids": "x"}, "must be whole numbers"),
    ({"ids": {}}, "must be whole numbers"), ({"ids": np.array([1.5])}, "must be whole numbers"),
    ({"ids": np.array([[1]])}, "must be whole numbers"), ({"ids": np.array([999])}, "must be whole numbers"),
    ({"ids": np.array([-1])}, r"ids \(=\[-1\]\) must be whole numbers from 0 to \d+; give")])
def test_mistakes_of_an_evaluation_are_named(photos: SampleIndex, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_eval_loader(photos, data=SMALL, **options)


def test_numbers_of_numpy_are_numbers(photos: SampleIndex) -> None:
    with make_train_loader(photos, batch_size=np.int64(3), data=SMALL, seed=np.int64(3), return_batch=True) as loader, \
            make_train_loader(photos, batch_size=3, data=SMALL, seed=3, return_batch=True) as other:
        assert next(loader).ids.tolist() == next(other).ids.tolist()


@pytest.mark.parametrize("state", [None, [], "step", {"step": 1 << 70}, {"step": -1}])
def test_a_state_that_is_none_is_refused(photos: SampleIndex, state: Any) -> None:
    with make_train_loader(photos, batch_size=4, data=SMALL) as loader, \
            pytest.raises(ValueError, match="loader state .*; give what state_dict returned"):
        loader.load_state_dict({**loader.state_dict(), **state} if isinstance(state, dict) else state)


def test_a_state_belongs_to_its_data_settings(photos: SampleIndex) -> None:
    boxes = DataConfig.preset("imagenet", region="square", square_px=76, crop_px=67)
    wider = DataConfig.preset("imagenet", region="square", square_px=76, crop_px=67, scale=(0.5, 1.0))
    for saved, other in ((boxes, wider), (boxes, SMALL), (SMALL, boxes)):
        with make_train_loader(photos, batch_size=4, data=saved) as loader:
            state = {**loader.state_dict(), "step": 3}
            loader.load_state_dict(state)
        with make_train_loader(photos, batch_size=4, data=other) as loader, \
                pytest.raises(ValueError, match=r"loader state data \(=[0-9a-f]*\) must equal this loader's"):
            loader.load_state_dict(state)


@pytest.mark.parametrize("rest", ["for images, labels in loader: pass",
                                  "next(loader); other = make_train_loader(path, batch_size=3, data='imagenet'); next(other)",
                                  "loader = make_eval_loader(path, split='train', data='imagenet'); next(iter(loader))"])
def test_a_script_that_closes_nothing_ends(photos: SampleIndex, rest: str) -> None:
    text = ("import sys; from pipeline import make_train_loader, make_eval_loader; path = sys.argv[1]; "
            f"loader = make_train_loader(path, batch_size=4, data='imagenet')\n{rest}\nprint('end')")
    done = subprocess.run([sys.executable, "-c", text, str(photos.path)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
