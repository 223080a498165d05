"""Processes of real runs that are killed, stopped or end with an error; all cases are in tests/slow/faults/test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.conftest import TinySet
from tests.helpers.disturbed_run import fails_at
from tests.helpers.faults import FAILING_STEP, Case, Trials
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, watch
from train.parallel import topology


@pytest.fixture(scope="module")
def trials(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), tiny_set.index)


def test_a_stopped_process_is_killed_and_the_restart_ends_with_the_same_weights(trials: Trials) -> None:
    trials.run(Case("stop in forward", 2, 0))


def test_torchrun_reports_rank_step_and_signal_of_a_killed_process(trials: Trials) -> None:
    trials.run(Case("kill in exchange", 2, 1), restarts=0)
    cause = trials.log("kill-in-exchange-1-2").partition("Root Cause")[2]
    # torchrun may have seen first that process 0's exchange failed: its report then names the killed one as the cause.
    assert ("(SIGKILL)" in cause or "kill -9" in cause) and f": rank 1 at step {FAILING_STEP} in forward" in cause, cause


def test_a_restart_resumes_its_own_run_only(tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of torchrun remembers what the first start began; a folder that was there before is not touched."""
    recipe, store = write_recipe(tmp_path, tiny_set.index), dist.HashStore()
    monkeypatch.setattr(topology, "_store", lambda *args: store)
    with monkeypatch.context() as patch:
        watch(patch, lambda network: fails_at(network, 3))
        _, err = here(recipe, tmp_path, "--machine.checkpoint_steps=1", code=4)
    assert "error: the machine is broken on purpose" in err
    out, _ = here(recipe, tmp_path, "--machine.stop_after=5", code=75)
    assert "restarted by torchrun: resuming as with --resume" in out and "at step 3\n" in out
    out, _ = here(recipe, tmp_path, "--machine.stop_after=5", code=75)  # what was asked to stop stays stopped
    assert out == "not started again by torchrun's --max-restarts: the run has ended with exit code 75\n"
    store = dist.HashStore()
    _, err = here(recipe, tmp_path, code=2)
    assert "already holds a run; resume it with --resume" in err
    assert "the run has ended with exit code 2" in here(recipe, tmp_path, "--machine.name=other", code=2)[0], "nor a mistake"
