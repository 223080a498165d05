"""Every fault in every process, for 2 and 4 processes: `pytest -m slow tests/slow/faults/test_ranks.py --junitxml FILE`.

The file has the seconds from each fault to the end of all processes (property `seconds`).
"""

from __future__ import annotations

from typing import Callable

import pytest

from tests.conftest import TinySet
from tests.helpers.fault_runner import FAULTS
from tests.helpers.faults import Case, Trials

CASES = [Case(fault, processes, rank) for processes in (2, 4) for fault in FAULTS
         for rank in (range(processes) if fault != "torchrun killed" else (0,))]


@pytest.fixture(scope="module")
def trials(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), tiny_set.index)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_end_name_the_cause_and_resume_bit_exactly(trials: Trials, case: Case,
                                                       record_property: Callable[[str, object], None]) -> None:
    record_property("seconds", round(trials.run(case), 2))
