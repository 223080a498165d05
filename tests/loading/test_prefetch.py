import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pipeline.loading.prefetch import Prefetcher
from pipeline.monitor import Monitor


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_end(depth: int) -> None:
    prefetcher = Prefetcher((item for item in range(10)), depth, Monitor())
    assert list(prefetcher) == list(range(10))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(prefetcher)
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failure_comes_in_its_place(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    prefetcher = Prefetcher(failing(), depth, Monitor())  # type: ignore[arg-type]
    assert next(prefetcher) == 1
    with pytest.raises(KeyError, match="two"):
        next(prefetcher)
    prefetcher.close()


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
    prefetcher = Prefetcher(endless(), 2, Monitor())  # type: ignore[arg-type]
    for item in range(5):
        assert next(prefetcher) == item
    for _ in range(100):
        if prefetcher._ready.full():
            break
        threading.Event().wait(0.01)
    assert len(made) <= 5 + 2 + 1  # two wait, one is finished and has no place yet
    prefetcher.close()
    prefetcher.close()
    assert closed.is_set() and threading.active_count() == before


def test_a_loader_nobody_closed_does_not_keep_the_interpreter() -> None:
    code = ("import itertools\nfrom pipeline.loading.prefetch import Prefetcher\nfrom pipeline.monitor import Monitor\n"
            "prefetcher = Prefetcher((i for i in itertools.count()), 2, Monitor())\nprint(next(prefetcher))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "0\n" and not done.stderr


def test_whoever_waits_when_it_is_closed_is_told() -> None:
    held, told = threading.Event(), []

    def slow() -> Iterator[int]:
        held.wait(10)
        yield 1

    prefetcher = Prefetcher(slow(), 1, Monitor())  # type: ignore[arg-type]

    def consume() -> None:
        try:
            next(prefetcher)
        except RuntimeError as error:
            told.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=prefetcher.close)
    closer.start()
    held.set()
    for thread in (closer, consumer):
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert told == [] or "was closed" in told[0]
    with pytest.raises(RuntimeError, match="this loader was closed"):
        next(prefetcher)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_closed_one_gives_nothing_more(depth: int) -> None:
    prefetcher = Prefetcher((item for item in range(5)), depth, Monitor())
    next(prefetcher)
    prefetcher.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="this loader was closed"):
            next(prefetcher)


def test_closing_from_its_own_thread_ends_it() -> None:
    """As when the garbage collector, at work in that thread, finds something that closes it."""
    box: list[Prefetcher[int]] = []

    def closing() -> Iterator[int]:
        yield 1
        box[0].close()
        yield 2

    box.append(Prefetcher(closing(), 1, Monitor()))  # type: ignore[arg-type]
    assert next(box[0]) == 1
    thread = box[0]._thread
    assert thread is not None
    thread.join(timeout=10)
    assert not thread.is_alive()
    box[0].close()
