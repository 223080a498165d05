"""The rows of tests.helpers.fault_rows, a few dozen trials each; 1,200 of each: tests/slow/faults."""
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.fault_rows import archive_rows, count, index_rows, packed_rows, resident_rows, stats_rows


@pytest.mark.parametrize(("rows", "trials"), [(index_rows, 24), (stats_rows, 36), (archive_rows, 12), (packed_rows, 8),
                                              (resident_rows, 8)])
def test_none_is_silent_and_none_a_traceback(tmp_path: Path, rows: Callable[[Path], object], trials: int) -> None:
    for name, trial in rows(tmp_path):  # type: ignore[attr-defined]
        tally = count(name, trial, trials, seed=1)
        assert not tally.wrong and tally.tried == trials, f"{tally}\n" + "\n".join(tally.wrong[:5])
