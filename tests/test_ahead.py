import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pipeline.ahead import Ahead
from pipeline.meter import Meter


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_end(depth: int) -> None:
    ahead = Ahead((item for item in range(10)), depth, Meter())
    assert list(ahead) == list(range(10))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    ahead.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failure_comes_in_its_place(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    ahead = Ahead(failing(), depth, Meter())  # type: ignore[arg-type]
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="two"):
        next(ahead)
    ahead.close()


def test_no_more_than_its_depth_is_made_ahead_and_closing_ends_the_thread() -> None:
    made, closed = [], threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                made.append(len(made))
                yield made[-1]
        finally:
            closed.set()

    before = threading.active_count()
    ahead = Ahead(endless(), 2, Meter())  # type: ignore[arg-type]
    for item in range(5):
        assert next(ahead) == item
    for _ in range(100):
        if ahead._ready.full():
            break
        threading.Event().wait(0.01)
    assert len(made) <= 5 + 2 + 1  # two wait, one is finished and has no place yet
    ahead.close()
    ahead.close()
    assert closed.is_set() and threading.active_count() == before


def test_a_loader_nobody_closed_does_not_keep_the_interpreter() -> None:
    code = ("import itertools\nfrom pipeline.ahead import Ahead\nfrom pipeline.meter import Meter\n"
            "ahead = Ahead((i for i in itertools.count()), 2, Meter())\nprint(next(ahead))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "0\n" and not done.stderr
