"""Checkpoints written behind training: of the moment asked for, one after the other, failures told, kills survived."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable

import pytest
import torch

from tests.helpers.checkpoints import ALONE, SHAPES, STATE, attach, check, disk_full, tensors
from tests.helpers.runs import ROOT, processes
from train.checkpoint import checkpoint
from train.checkpoint.async_saver import AsyncSaver


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """The tensors change while it is written: by the next steps."""
    saver, go = AsyncSaver(tmp_path, ALONE, 2, 60), threading.Event()

    def slowly(folder: Path) -> None:
        assert go.wait(20)
        attach(folder)
    current = tensors(1)
    saver.save("step-000000001", current, SHAPES, STATE, slowly)
    assert not checkpoint.checkpoints(tmp_path), "it has waited for the writing"
    for tensor in current.values():
        tensor.zero_()
    go.set()
    saver.wait()
    check(tmp_path / "step-000000001", 1)
    for step in 2, 3:  # the second waits for the first
        saver.save(f"step-00000000{step}", tensors(step), SHAPES, STATE, attach)
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"], "not pruned"
    for step in 2, 3:
        check(tmp_path / f"step-00000000{step}", step)


def test_tensors_that_lie_otherwise_in_memory_are_saved_as_they_are(tmp_path: Path) -> None:
    whole = {key: tensor.t() if tensor.dim() == 2 else tensor for key, tensor in tensors(1).items()}
    saver = AsyncSaver(tmp_path, ALONE, 2, 60)
    saver.save("step-000000001", whole, {key: tuple(tensor.shape) for key, tensor in whole.items()}, STATE, attach)
    saver.wait()
    found = {key: torch.zeros(tensor.shape) for key, tensor in whole.items()}
    checkpoint.load(tmp_path / "step-000000001", found, {key: tuple(tensor.shape) for key, tensor in whole.items()}, ALONE)
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """As on NFS, when an evaluation has one of its files open."""
    def rmtree(path: Path, original: Callable[..., None] = shutil.rmtree, ignore_errors: bool = False) -> None:
        if "000000001" in path.name and path.exists():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "__0_0.distcp")
        original(path, ignore_errors=ignore_errors)
    saver = AsyncSaver(tmp_path, ALONE, 1, 60)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", rmtree)
        for step in (1, 2, 3):
            saver.save(f"step-{step:09d}", tensors(step), SHAPES, STATE, attach)
            saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000000001.partial", "step-000000003"]
    said = f"warning: old checkpoints (={tmp_path}) could not all be removed (Directory not empty); they stay until a later save"
    assert capsys.readouterr().err.count(said) == 2
    saver.save("step-000000004", tensors(4), SHAPES, STATE, attach)
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004"]


def test_a_failure_is_raised_at_the_next_call_once_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    saver = AsyncSaver(tmp_path, ALONE, 2, 60)
    saver.save("step-000000001", tensors(1), SHAPES, STATE, attach)
    saver.save("step-000000002", tensors(2), SHAPES, STATE, disk_full)
    with pytest.raises(RuntimeError, match=r"checkpoint \(=.*step-000000002\) could not be written: folder \(=.*\) cannot be "
                       r"written: the disk is full; .*; the ones before it are whole: mend this, then go on with --resume"):
        saver.save("step-000000003", tensors(3), SHAPES, STATE, attach)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"], "what was half-written takes room"
    with monkeypatch.context() as patch:  # torch wraps what fails while it writes
        patch.setattr(torch, "save", disk_full)
        saver.save("step-000000002", tensors(2), SHAPES, STATE, attach)
        with pytest.raises(RuntimeError, match=r"step-000000002\) could not be written: process 0: a file or folder cannot be "
                                               r"written: the disk is full; make room .*; the ones") as caught:
            saver.wait()
        assert "\n" not in str(caught.value)
    saver.save("step-000000002", tensors(2), SHAPES, STATE, disk_full)
    saver.close()
    assert "warning: checkpoint (=" in capsys.readouterr().err
    check(tmp_path / "step-000000001", 1)


DYING = """
import sys, time
from pathlib import Path
from tests.helpers.checkpoints import ALONE, SHAPES, STATE, attach, tensors
from train.checkpoint.async_saver import AsyncSaver
saver = AsyncSaver(Path(sys.argv[1]), ALONE, 2, 60)
saver.save("step-000000001", tensors(1), SHAPES, STATE, attach)
def slowly(folder):
    attach(folder)
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
saver.save("step-000000002", tensors(2), SHAPES, STATE, slowly)
print("training", flush=True)
raise SystemExit(5)
"""


def test_killed_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", DYING, str(tmp_path), "60"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(2)) == ["training\n", "writing\n"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    found = checkpoint.newest_good(tmp_path, pytest.fail)
    assert found is not None and (tmp_path / ".step-000000002.partial").exists()
    check(found, 1)
    saver = AsyncSaver(tmp_path, ALONE, 2, 60)
    saver.save("step-000000003", tensors(3), SHAPES, STATE, attach)
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


def test_a_process_that_ends_lets_the_save_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DYING, str(tmp_path), "1"], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == 5, done.stderr
    assert checkpoint.newest_good(tmp_path, pytest.fail) == tmp_path / "step-000000002"


TOGETHER = """
import sys, threading, warnings
warnings.simplefilter("error")
from pathlib import Path
import torch
import torch.distributed as dist
from model.towers import Tower, tower_slice
from tests.helpers.checkpoints import SHAPES, STATE, attach, disk_full, tensors
from train.checkpoint import checkpoint
from train.checkpoint.async_saver import AsyncSaver
from train.parallel.topology import process_group
root = Path(sys.argv[1])
torch.set_num_threads(1)
with process_group(towers=2, device="cpu", timeout_s=60) as where:
    saver = AsyncSaver(root, where, 3, 60)
    mine = {name: tower_slice(whole, Tower(where.tower_rank, 2)).clone() for name, whole in tensors(1).items()}
    released = threading.Event()
    def once_released(folder):
        assert released.wait(60)
        attach(folder)
    saver.save("step-000000001", mine, SHAPES, STATE, once_released)
    for _ in range(200):  # training goes on, its collectives beside those of the save
        assert where.all_reduce_sum([1.0]) == [2.0]
    assert not (root / "step-000000001").exists(), "it has waited for the writing"
    released.set()
    saver.wait()
    checkpoint.verify(root / "step-000000001")
    for spoilt, found in (("second", "process 1: a file or folder cannot be written: the disk is full"), ("main", "")):
        save, torch.save = torch.save, disk_full if spoilt == "second" and not where.is_main else torch.save
        saver.save("step-000000002", mine, SHAPES, STATE, disk_full if spoilt == "main" else attach)
        assert where.all_reduce_sum([1.0]) == [2.0]
        try:
            saver.wait()
            raise AssertionError("the failure of one is that of both")
        except RuntimeError as error:
            assert "step-000000002) could not be written: " + found in str(error), error
            assert spoilt == "second" or "cannot be written: the disk is full; make room" in str(error), error
        torch.save = save
    saver.save("step-000000002", mine, SHAPES, STATE, attach)
    saver.wait()
    checkpoint.verify(root / "step-000000002")
    print("done")
"""


def test_two_processes_train_while_they_save_and_fail_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER, encoding="utf-8")
    root = tmp_path / "checkpoints"
    processes(2, script, root)
    assert [path.name for path in checkpoint.checkpoints(root)] == ["step-000000001", "step-000000002"]
    assert not list(root.glob(".step*"))
    for path in checkpoint.checkpoints(root):
        check(path, 1)
