"""Processes of real runs that are killed, stopped and fed with errors: a few of the many cases of tools/try_faults.py."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.alexnet import AlexNet
from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import here, watch
from tools import try_faults
from tools.try_faults import STRUCK, Case, Trials, cases
from train.parallel import topology as distributed


@pytest.fixture(scope="module")
def trials(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    work = tmp_path_factory.mktemp("faults")
    recipe = write_recipe(work, tiny_set.index)
    return Trials(work, ["--config", str(recipe), *try_faults.SMALL])


@pytest.mark.parametrize("case", [Case("kill in exchange", 2, 1), Case("stop in forward", 2, 0)], ids=lambda case: case.fault)
def test_all_end_soon_say_why_leave_nothing_and_go_on_to_the_same_weights(trials: Trials, case: Case) -> None:
    outcome = trials.run(case)
    assert not outcome.wrong, outcome
    assert 0 <= outcome.seconds <= case.limit_s


def fails_at(network: AlexNet, number: int) -> None:
    """An error of the machine when the network sees its training batch of this number, from 0."""
    count = iter(range(10 ** 6))

    def fail(module: Any, inputs: Any) -> None:
        if module.training and next(count) == number:
            raise OSError("the machine is broken on purpose")
    network.register_forward_pre_hook(fail)


def test_a_restart_goes_on_with_its_own_run_only(tiny_set: TinySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of torchrun remembers what the first start began; a folder that was there before is not touched."""
    recipe, store = write_recipe(tmp_path, tiny_set.index), distributed.dist.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda *words: store)
    with monkeypatch.context() as patch:
        watch(patch, lambda network: fails_at(network, 3))
        _, err = here(recipe, tmp_path, "--machine.checkpoint_steps=1", code=4)
    assert "error: the machine is broken on purpose" in err
    out, _ = here(recipe, tmp_path, "--machine.stop_after=5", code=75)
    assert "restarted by torchrun: resuming as with --resume" in out and "at step 3\n" in out
    out, _ = here(recipe, tmp_path, "--machine.stop_after=5", code=75)  # what was asked to stop stays stopped
    assert out == "not started again by torchrun's --max-restarts: the run has ended with exit code 75\n"
    store = distributed.dist.HashStore()
    _, err = here(recipe, tmp_path, code=2)
    assert "already holds a run; resume it with --resume" in err
    assert "the run has ended with exit code 2" in here(recipe, tmp_path, "--machine.name=other", code=2)[0], "nor a mistake"


def test_the_table_has_every_fault_in_every_process() -> None:
    table = cases([2, 4], [])
    assert len(table) == len(set(table)) == 2 * 1 + 6 * (len(try_faults.FAULTS) - 2)
    assert {case.rank for case in cases([4], ["SIGTERM"])} == {0, 1, 2, 3} and cases([4], ["torchrun"])[0].rank == 0
    assert Case("gradient is NaN", 2, 1).codes == ({3}, {3}) and Case("SIGTERM in backward", 2, 1).codes == ({75}, {75})
    assert Case("stop in save", 2, 1).codes == ({None}, {4}) and Case("stop in save", 2, 1).limit_s > try_faults.SILENCE_S
    assert Case("kill in update", 4, 3).told == f"error: rank 3 at step {STRUCK} in update:* without a word, as after kill -9"


def test_what_is_wrong_is_found(trials: Trials, tmp_path: Path) -> None:
    """Notes and words of a run that ended badly."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for rank, events in enumerate([[{"event": "left", "code": 1}], [{"event": "started"}, {"event": "struck"}]]):
        (notes / f"0-{rank}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"ev', encoding="utf-8")
    told = "error: process 0 (pid 7 on x) was killed at step 8 in load; this process (1) ends\n"
    (notes / "log").write_text(told, encoding="utf-8")
    outcome = try_faults.Outcome(Case("kill in load", 2, 1))
    ended = SimpleNamespace(poll=lambda: -signal.SIGKILL, returncode=1)
    trials._check(outcome.case, notes, ended, outcome)  # type: ignore[arg-type]
    assert outcome.wrong == ["process 0 has not started", "process 0 left with 1", "0 of 1 others named it"]
