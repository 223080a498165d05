"""The line on data wait at the end of a run."""
from pathlib import Path

from pipeline.compute_stats import compute
from pipeline.config import DataConfig
from pipeline.monitor import Waits
from pipeline.tiers import train_loader
from tests.helpers.small_set import photographs, write_set
from train.console import DataWait


def test_the_summary_by_hand() -> None:
    assert DataWait(Waits(0.5, decode=0.5, batches=50), 100.0).summary() == "data wait: 0.5% of the time"
    starved = DataWait(Waits(40.0, read=28.0, decode=8.0, batches=50), 100.0)
    assert starved.summary().startswith(
        "data wait: 40.0% of the time (of that read 70%, decode 20%, other 10%): put the images on faster "
        "storage or raise machine.read_threads; or write packed shards once")
    assert "raise data.lanes" in starved.summary("streamed")
    for tier, better in (("archives", "data.tier: packed"), ("packed", "data.tier: resident"), ("resident", "the first epoch")):
        told = DataWait(Waits(40.0, decode=40.0, batches=50), 100.0).summary(tier)
        assert better in told and f"data.tier: {tier}" not in told
    late = DataWait(Waits(40.0, copy=40.0, batches=50), 100.0)
    assert "raise machine.queue" in late.summary() and "try --parallel.feed=replicate" in late.summary(swaps=True)
    assert DataWait().summary() == ""


def test_the_first_batch_of_a_run_is_the_loaders_start(tmp_path: Path) -> None:
    index = write_set(tmp_path, photographs(12))
    data, watched = DataConfig("square", 76, 67, True, 0.1, "channel"), DataWait()
    with train_loader("archives", index, "train", data, 4, 1, compute(index, "train", 76)) as loader:
        for _ in range(2):
            with watched.measured(loader.monitor):
                for _ in loader:
                    watched.batch_arrived(loader.monitor)
        assert watched.waits.batches == 5 and watched.waits.seconds < loader.monitor.waits.seconds
