"""Worker processes: what they are told they do at the same time, and what goes wrong in one is named."""
import os

import pytest

from tests.helpers.workers import add, counter
from tools.bench.workers import NotAvailable, Workers


def test_every_process_answers_and_a_death_is_named() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    workers = Workers("team two", counter, [(10,), (20,)], [{"RANK": "0"}, {"RANK": "1"}])
    try:
        assert workers.call(add, 1) == [(11, "1", "0"), (21, "1", "1")] and os.environ.get("OMP_NUM_THREADS") == before
        assert workers.call(add, 1)[1][0] == 22
        with pytest.raises(RuntimeError, match=r"^process 0 of team two died \(exit code -9\)$"):
            workers.call(add, 99)
    finally:
        workers.close()


def test_a_process_that_does_not_start_says_why() -> None:
    with pytest.raises(NotAvailable, match="^x is not installed$"):
        Workers("one", counter, [(-1,)])
    with pytest.raises(RuntimeError, match="^one failed: ValueError: of several lines: why$"):
        Workers("one", counter, [(-2,)])
