"""Every row of tests.helpers.fault_rows, 1,200 trials each: none is silent, none ends in a traceback, none hangs."""
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.fault_rows import archive_rows, count, index_rows, packed_rows, resident_rows, stats_rows

TRIALS = 1200


@pytest.mark.slow
@pytest.mark.parametrize("rows", [index_rows, stats_rows, archive_rows, packed_rows, resident_rows])
def test_long(tmp_path: Path, rows: Callable[[Path], object], record_property: Callable[[str, object], None]) -> None:
    for name, trial in rows(tmp_path):  # type: ignore[attr-defined]
        tally = count(name, trial, TRIALS, seed=0)
        record_property(name, str(tally))
        assert not tally.wrong, f"{tally}\n" + "\n".join(tally.wrong[:5])
