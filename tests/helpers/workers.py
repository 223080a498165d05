"""Functions that worker processes run in tests/bench/test_workers.py: spawned processes import them by name."""
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tools.bench.workers import NotAvailable


@contextmanager
def counter(start: int) -> Iterator[list[int]]:
    """A state that commands work on; -1 and -2 cannot be started."""
    if start == -1:
        raise NotAvailable("x is not installed")
    if start == -2:
        raise ValueError("a worker's traceback\nof several lines: why")
    yield [start]


def add(state: list[int], number: int) -> tuple[int, str | None, str | None]:
    """The sum, and what the environment says; kills its process at 99."""
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    state[0] += number
    return state[0], os.environ.get("OMP_NUM_THREADS"), os.environ.get("RANK")
