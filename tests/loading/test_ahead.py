import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pipeline.loading.prefetch import Ahead
from pipeline.monitor import Meter


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
    code = ("import itertools\nfrom pipeline.loading.prefetch import Ahead\nfrom pipeline.monitor import Meter\n"
            "ahead = Ahead((i for i in itertools.count()), 2, Meter())\nprint(next(ahead))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "0\n" and not done.stderr


def test_whoever_waits_when_it_is_closed_is_told() -> None:
    held, told = threading.Event(), []

    def slow() -> Iterator[int]:
        held.wait(10)
        yield 1

    ahead = Ahead(slow(), 1, Meter())  # type: ignore[arg-type]

    def consume() -> None:
        try:
            next(ahead)
        except RuntimeError as error:
            told.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    held.set()
    for thread in (closer, consumer):
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert told == [] or "was closed" in told[0]
    with pytest.raises(RuntimeError, match="this loader was closed"):
        next(ahead)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_closed_one_gives_nothing_more(depth: int) -> None:
    ahead = Ahead((item for item in range(5)), depth, Meter())
    next(ahead)
    ahead.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this loader was closed"):
            next(ahead)


def test_closing_from_its_own_thread_ends_it() -> None:
    """As when the garbage collector, at work in that thread, finds something that closes it."""
    box: list[Ahead[int]] = []

    def closing() -> Iterator[int]:
        yield 1
        box[0].close()
        yield 2

    box.append(Ahead(closing(), 1, Meter()))  # type: ignore[arg-type]
    assert next(box[0]) == 1
    thread = box[0]._thread
    assert thread is not None
    thread.join(timeout=10)
    assert not thread.is_alive()
    box[0].close()
