"""Stages measured on a real loader: the same pixels, figures that add up, and a verdict that names what was slowed."""
import errno
import os
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.profile import stages
from pipeline.decoding.normalize import Normalizer
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch, LoaderContext
from pipeline.loading.train_loader import TrainLoader
from pipeline.reading import source
from pipeline.reading.source import ArchiveSource
from pipeline.compute_stats import compute
from pipeline.stats import Stats
from tools.profile.measure import Workload, measure
from tools.profile.verdict import NETWORK, Measured, Setup, Verdict, verdict
from tests.helpers.loaders import train_loader
from tests.helpers.small_set import encode, photographs, picture, write_set

DATA = DataConfig(region="square", square_px=76, crop_px=67, mirror=True, lighting=0.1, mean="image")
MACHINE = LoaderConfig(threads=1)
BATCH = 10


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[SampleIndex, Stats]:
    index = write_set(tmp_path_factory.mktemp("stages"), photographs(40))
    return index, compute(index, "train", 76)


def opened(small: tuple[SampleIndex, Stats], machine: LoaderConfig = MACHINE, batch: int = BATCH,
           tier: str = "archives") -> TrainLoader:
    return train_loader(tier, small[0], "train", DATA, batch, 0, small[1], machine=machine)


def measured(small: tuple[SampleIndex, Stats], consume: Callable[[Batch], None] | None = None, need: float | None = None,
             seconds: float = 0.1, repeats: int = 1) -> Measured:
    with ExitStack() as closers:
        loader = closers.enter_context(opened(small))
        works, _ = stages.workloads(loader, lambda machine: opened(small, machine), closers)
        fed = [stages.end_to_end(loader, consume, "together")] if consume else []
        figures = measure([*works, stages.end_to_end(loader), *fed], seconds, repeats)
    return Measured(tuple(figures[work.name] for work in works), figures["loader"], need, figures.get("together"))


def judged(small: tuple[SampleIndex, Stats], **more: Any) -> Verdict:
    setup = Setup("archives", MACHINE, 8, False, 40, 76, True, 64 << 30)
    return verdict(measured(small, **more), setup)


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The same, late."""
    def late(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return function(*given, **named)
    return late


# The verdict on the real loader

def test_a_slow_disk_is_named(small: tuple[SampleIndex, Stats], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArchiveSource, "read_batch", slowed(ArchiveSource.read_batch, 0.2))
    found = judged(small)
    assert found.limit == "read" and "read_threads: 4" in found.advice_yaml and "tier: packed" in found.advice_yaml


def test_slow_checks_are_named(small: tuple[SampleIndex, Stats], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (source, stages):
        monkeypatch.setattr(module, "crc32", slowed(zlib.crc32, 0.01))
    found = judged(small)
    assert found.limit == "crc" and "check_crc: false" in found.advice_yaml


def test_too_few_threads_are_named(tmp_path: Path) -> None:
    # Large enough that decoding, not handing over, is what one thread cannot do faster; small ones are a matter of luck.
    index = write_set(tmp_path, [encode(picture(number, 700, 900)) for number in range(BATCH)])
    found = judged((index, compute(index, "train", 76)))
    assert found.limit in ("decode", "normalize") and "threads: 8" in found.advice_yaml


def test_slow_normalizing_is_named(small: tuple[SampleIndex, Stats], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Normalizer, "_some", slowed(Normalizer._some, 0.1))
    assert judged(small).limit == "normalize"


def test_a_slow_copy_is_named(small: tuple[SampleIndex, Stats], monkeypatch: pytest.MonkeyPatch) -> None:
    true = LoaderContext.batch

    def late(context: LoaderContext, *given: Any) -> Batch:
        context.monitor.enter("copy")
        time.sleep(0.1)
        return true(context, *given)

    monkeypatch.setattr(LoaderContext, "batch", late)
    found = judged(small)
    assert found.limit == "hand-over" and "handing over" in found.sentence


def test_a_slow_network_is_named(small: tuple[SampleIndex, Stats]) -> None:
    found = judged(small, consume=lambda batch: time.sleep(0.1), need=BATCH / 0.1)
    assert found.limit == NETWORK and "headroom" in found.sentence


# The stages themselves

def stage_workloads(small: tuple[SampleIndex, Stats], machine: LoaderConfig, closers: ExitStack,
                    tier: str = "archives") -> tuple[TrainLoader, list[Workload], list[Workload]]:
    loader = closers.enter_context(opened(small, machine, tier=tier))
    loader.fill()
    return loader, *stages.workloads(loader, lambda changed: opened(small, changed, tier=tier), closers)


def test_stages_add_up(small: tuple[SampleIndex, Stats]) -> None:
    found = measured(small, seconds=0.15, repeats=3)
    assert [stage.name for stage in found.stages] == ["read", "crc", "decode", "normalize", "hand-over"]
    # A tenth on a quiet machine with photographs (docs/results); here 40 small pictures on a machine that does other things.
    assert abs(found.loader.cpu - found.stages_cpu) < 0.5 * found.loader.cpu
    assert found.loader.waited > 0.5 and sum(found.loader.causes.values()) == pytest.approx(1)


def test_stages_of_a_loader_that_checks_nothing_and_reads_in_its_own_thread(small: tuple[SampleIndex, Stats]) -> None:
    with ExitStack() as closers:
        _, alone, cut = stage_workloads(small, LoaderConfig(threads=1, read_threads=0, check_crc=False), closers)
        assert [stage.name for stage in alone] == ["read", "decode", "normalize", "hand-over"]
        assert [stage.name for stage in cut] == ["up to decode", "up to normalize"]
        assert all(next(stage.batches) == BATCH for stage in (*alone, *cut) for _ in range(6))


def test_ready_made_inputs_are_normalized_to_the_loaders_batches(small: tuple[SampleIndex, Stats]) -> None:
    with opened(small) as loader, closing(loader.chain.normalizer()) as normalizer:  # type: ignore[attr-defined]
        inputs = stages.ready(loader)
        assert len(inputs) == len(loader) == 4 and all(isinstance(view.obj, bytes) for view in inputs[0][0].encoded)
        for (plan, pixels), batch in zip(inputs, loader):
            assert (normalizer.begin(pixels, plan.augmentation)() == batch.images).all()
        assert stages.image_bytes(loader) == pytest.approx(float(np.mean(small[0].samples["size"])))


def test_cut_off_after_each_stage(small: tuple[SampleIndex, Stats]) -> None:
    with ExitStack() as closers:
        _, alone, cut = stage_workloads(small, MACHINE, closers)
        assert [stage.name for stage in cut] == ["up to crc", "up to decode", "up to normalize"]
        assert all(next(stage.batches) == BATCH for stage in (*alone, *cut) for _ in range(6))


def test_an_undecodable_picture_is_replaced_in_the_stages_too(tmp_path: Path) -> None:
    blobs = photographs(20)
    blobs[3] = blobs[3][:len(blobs[3]) // 4]
    index = write_set(tmp_path, blobs)
    machine = LoaderConfig(threads=1, quarantine_budget=0.1)
    with ExitStack() as closers:
        _, alone, cut = stage_workloads((index, compute(index, "train", 76, machine=machine)), machine, closers)
        assert all(next(stage.batches) == BATCH for stage in (*alone, *cut) for _ in range(4))


def test_resident(small: tuple[SampleIndex, Stats], tmp_path: Path) -> None:
    with ExitStack() as closers:
        loader, alone, cut = stage_workloads(small, LoaderConfig(threads=1, resident_folder=str(tmp_path)), closers, "resident")
        assert [stage.name for stage in alone] == ["normalize", "hand-over"] and cut == []
        assert measure([*alone, stages.end_to_end(loader)], 0.02, 1)["loader"].rate > 0


# Cold files

def test_cold(small: tuple[SampleIndex, Stats]) -> None:
    cold, note = stages.measure_cold(lambda: opened(small), small[0], "train", 0.05, 2)
    assert len(cold.rates) == 2 and "start-up included" in note and cold.waited > 0


@pytest.mark.parametrize(("error", "kept"), [(BlockingIOError(), 0.0), (OSError(errno.EOPNOTSUPP, ""), 1.0), (None, 1.0)])
def test_dropping_is_probed(small: tuple[SampleIndex, Stats], monkeypatch: pytest.MonkeyPatch, error: OSError | None,
                            kept: float) -> None:
    def probe(*given: Any) -> int:
        if error is not None:
            raise error
        return 1

    monkeypatch.setattr(os, "preadv", probe)
    assert stages.drop(small[0], "train") == kept
