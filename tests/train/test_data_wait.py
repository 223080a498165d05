"""Headroom from busy threads, and the line on data wait at the end of a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.helpers.loaders import train_loader
from tests.helpers.small_set import photographs, write_set

from pipeline.config import DataConfig, LoaderConfig
from pipeline.monitor import Headroom, Usage, Waits, headroom
from pipeline.compute_stats import compute
from train.logs.console import DataWait

MACHINE = LoaderConfig(read_threads=2)


def test_headroom_by_hand() -> None:
    used = Usage(time=10.0, read=4.0, decode=6.0, making=1.5)
    assert headroom(used, MACHINE, 1) == Headroom(10 / 6, "decode")
    assert headroom(used, MACHINE, 4) == Headroom(5.0, "read")
    assert headroom(Usage(10.0, 0, 1.0, 4.0), MACHINE, 1) == Headroom(2.5, "making batches")
    later = Usage(time=30.0, read=5.0, decode=1.0, making=3.0)  # decoding threads have ended meanwhile
    assert Usage(time=1.0).plus(later.since(used)) == Usage(time=21.0, read=1.0, decode=0.0, making=1.5)


def test_the_summary_by_hand() -> None:
    used = Usage(time=100.0, read=1.0, decode=20.0, making=2.0)
    fed = DataWait(Waits(0.5, decode=0.5, batches=50), used)
    assert fed.summary(MACHINE, 2, False) == "compute-bound: the loader could deliver 10.0× more; data wait 0.5%"
    assert fed.summary(MACHINE, 2, True) == "compute-bound: data wait 0.5%"
    starved = DataWait(Waits(40.0, read=28.0, decode=8.0, batches=50), used)
    assert starved.summary(MACHINE, 2, False).startswith(
        "data-bound: data wait 40.0% (read 70%, decode 20%, other 10%); put the images on faster "
        "storage or raise machine.read_threads; or write packed shards once")
    assert starved.summary(MACHINE, 2, False).endswith("; see `alexnet profile RECIPE`")
    some = DataWait(Waits(3.0, decode=3.0, batches=50), used)
    assert some.summary(MACHINE, 2, False).startswith("mostly compute-bound: data wait 3.0% (decode 100%); write packed")
    assert "raise data.lanes" in starved.summary(MACHINE, 2, False, "streamed")
    for tier, better in (("archives", "data.tier: packed"), ("packed", "data.tier: resident"), ("resident", "the first epoch")):
        told = DataWait(Waits(40.0, decode=40.0, batches=50), used).summary(MACHINE, 2, False, tier)
        assert better in told and f"data.tier: {tier}" not in told
    late = DataWait(Waits(40.0, copy=40.0, batches=50), used)
    assert "raise machine.queue" in late.summary(MACHINE, 2, False)
    assert "try --parallel.feed=replicate" in late.summary(MACHINE, 2, False, swaps=True)
    assert DataWait().summary(MACHINE, 2, False) == ""


def test_the_first_batch_of_a_run_is_the_loaders_start(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(12))
    data, watched = DataConfig("square", 76, 67, True, 0.1, "channel"), DataWait()
    with train_loader("archives", index, "train", data, 4, 1, compute(index, "train", 76)) as loader:
        for _ in range(2):
            with watched.measured(loader.monitor):
                for _ in loader:
                    watched.batch_arrived(loader.monitor)
        assert watched.waits.batches == 5 and watched.waits.seconds < loader.monitor.waits.seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_dalis_threads_are_found_and_their_work_counted(tmp_path: Path, threads: int) -> None:
    index = write_set(tmp_path, photographs(12))
    data = DataConfig("square", 76, 67, True, 0.1, "channel")
    machine, watched = LoaderConfig(threads=threads, read_threads=1), DataWait()
    with train_loader("archives", index, "train", data, 4, 1, compute(index, "train", 76), machine=machine) as loader:
        for _ in range(3):
            with watched.measured(loader.monitor):
                assert len(list(loader)) == 3
        assert len(loader.monitor.decoders) >= threads
    assert watched.waits.batches == 9
    assert 0 < watched.used.decode < threads * watched.used.time and 0 < watched.used.read and 0 < watched.used.making
    assert "data wait" in watched.summary(machine, threads, False)


@pytest.mark.slow  # it compares rates: for a machine that does nothing else
@pytest.mark.parametrize("threads", [1, 2])
def test_headroom_is_what_the_loader_then_gives(tmp_path: Path, threads: int) -> None:
    """Slowed down by its consumer, the loader claims a rate; asked without pause it gives about that. (What is in flight and the
    machine's other work make up to a factor of two.)"""
    index = write_set(tmp_path, photographs(60))
    data = DataConfig("square", 256, 227, True, 0.1, "channel")
    machine, slow = LoaderConfig(threads=threads), DataWait()
    with train_loader("archives", index, "train", data, 10, 1, compute(index, "train", 256), machine=machine) as loader:
        assert len(list(loader)) == 6
        start = time.perf_counter()
        for _ in range(4):
            for _ in loader:
                pass
        alone = 24 / (time.perf_counter() - start)
        with slow.measured(loader.monitor):
            start = time.perf_counter()
            for _ in range(2):
                for _ in loader:
                    time.sleep(4 / alone)
            slowed = 12 / (time.perf_counter() - start)
        claimed = headroom(slow.used, machine, threads).times * slowed
    assert alone / 3 < claimed < alone * 3
