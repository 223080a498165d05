"""Loaders in forked children, and loaders that nobody closes, by draws."""
from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import DataConfig, LoaderConfig, SampleIndex, Stats, TrainLoader, make_train_loader
from tests.conftest import TinySet
from tests.helpers.trials import Row


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_and_garbage(tiny_set: TinySet, tmp_path: Path, count: int,
                          record_property: Callable[[str, object], None]) -> None:
    """A loader used in a forked child is refused at once; one that is dropped without close gives back its threads and files."""
    trials = Row("fork and garbage", limit_s=60)
    index = SampleIndex.load(tiny_set.index)
    stats = Stats.for_index(index, 76)
    data = DataConfig(region="square", square_px=76, crop_px=67)

    def make(draw: random.Random) -> TrainLoader:
        tier = draw.choice(("archives", "resident"))
        machine = LoaderConfig(threads=draw.randrange(1, 3), prefetch=draw.randrange(1, 4), resident_folder=str(tmp_path))
        made = make_train_loader(index, "train", 8, data=data, tier=tier, seed=draw.randrange(9), stats=stats, machine=machine)
        for _ in range(draw.randrange(len(made))):  # an epoch ends with StopIteration
            next(made)
        return made

    def used_in_a_child(draw: random.Random) -> bool:
        with make(draw) as made:
            step, child = made.state_dict()["step"], os.fork()
            if not child:
                refused = 0
                for use in (lambda: next(made), lambda: made.load_state_dict({"step": 0})):
                    try:
                        use()
                    except RuntimeError as error:
                        refused += "cannot be used in process" in str(error)
                os._exit(refused)
            status = os.waitpid(child, 0)[1]
            next(made)
            return os.waitstatus_to_exitcode(status) == 2 and made.state_dict()["step"] == step + 1

    def dropped(draw: random.Random) -> bool:
        made = make(draw)
        chain = weakref.ref(made.chain)
        del made
        deadline = time.monotonic() + 30
        while chain() is not None or {"loader", "closer"} & {one.name for one in threading.enumerate()}:
            gc.collect()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    descriptors = []
    for draw in trials.draws(count):
        work = draw.choice((used_in_a_child, dropped))
        trials.trial(work.__name__, lambda: work(draw))
        gc.collect()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert descriptors[-1] <= descriptors[0] + 4, descriptors
    trials.check(record_property)
