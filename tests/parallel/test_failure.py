"""The monitor of processes: who is ended, who is named. Whole runs are in test_faults.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.monitored import SILENCE_S, TIMEOUT_S, end, start
from tests.helpers.runs import ROOT
from train.parallel.failure import enter_phase, monitored, reported
from train.parallel.topology import agreed_prefix


def test_a_failed_collective_is_blamed_on_the_process_that_failed_first(tmp_path: Path) -> None:
    processes = start(tmp_path, "fail in a collective", "be killed", "fail in a collective", "leave")
    for rank in (0, 2):
        code, err = end(processes[rank], tmp_path, rank, 20)
        assert code == 1 and ("RuntimeError: rank 1 at step 17 in load: ended without an error, as after kill -9, in a crash, or "
                              f"for want of memory; rank {rank} at step 17 in forward ends") in err
    assert end(processes[3], tmp_path, 3, 20) == (0, "")
    assert json.loads((tmp_path / "1/error.json").read_text())["message"] == "rank 1 at step 17 in load", "torchrun prints it"


def test_an_error_is_reported_with_its_position_and_named_by_others(tmp_path: Path) -> None:
    processes = start(tmp_path, "fail in a collective", "raise")
    errors = [end(processes[rank], tmp_path, rank, 20)[1] for rank in range(2)]
    assert "rank 1 at step 17 in load: the disk is full; rank 0 at step 17 in forward ends" in errors[0]
    assert "OSError: the disk is full\nrank 1 at step 17 in load\n" in errors[1]
    assert json.loads((tmp_path / "1/error.json").read_text())["message"] == "rank 1 at step 17 in load: the disk is full"


def test_a_stopped_process_is_killed_and_those_that_wait_in_a_library_end(tmp_path: Path) -> None:
    processes = start(tmp_path, "wait in C", "be stopped")
    assert end(processes[1], tmp_path, 1, SILENCE_S + 10)[0] == -signal.SIGKILL
    code, err = end(processes[0], tmp_path, 0, 10)
    assert code == 4 and err.startswith("error: rank 1 at step 17 in load: stopped (SIGSTOP) for 1 s (machine.silence_s), and "
                                        "killed; rank 0 at step 17 in load ends. The stacks of its threads:\n")


def test_a_hang_is_blamed_on_the_process_that_others_wait_for(tmp_path: Path) -> None:
    processes = start(tmp_path, "hang in forward", "hang in load")
    for rank in range(2):
        code, err = end(processes[rank], tmp_path, rank, TIMEOUT_S + 10)
        assert code == 4 and err.startswith("error: rank 1 at step 17 in load: no progress for 2 s (machine.timeout_s); "
                                            f"rank {rank} at step 17 in {('forward', 'load')[rank]} ends. The stacks")
        assert "in do" in err and "in _watch" in err, "of every thread"


def test_a_failure_elsewhere_gives_a_hanging_process_no_more_time(tmp_path: Path) -> None:
    """Its own limit, here 7 s, may end sooner than the time others have to end."""
    (tmp_path / "1").mkdir()
    failed = {"message": "", "timestamp": 0.0, "pid": 1, "state": "failed", "phases": 1}
    (tmp_path / "1/error.json").write_text(json.dumps(failed))
    code = ("import time; from train.parallel import failure\n"
            "with failure.monitored(0, 2, 7, 30):\n"
            "    failure.enter_phase('load', 1)\n"
            "    while not failure._Monitor.active._ending: time.sleep(0.01)\n"
            "    print(failure._Monitor.active._limit_s)\n")
    (tmp_path / "0").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "0/error.json")})
    assert done.stdout == "7\n"


def test_a_library_that_keeps_pythons_lock_is_ended_too(tmp_path: Path) -> None:
    code, err = end(start(tmp_path, "hang with Python's lock")[0], tmp_path, 0, TIMEOUT_S + 10)
    assert code == 1 and err.startswith("Timeout (0:00:06)!") and "in do" in err


def test_progress_is_no_hang(tmp_path: Path) -> None:
    assert end(start(tmp_path, "work longer than a hang")[0], tmp_path, 0, 20) == (0, "")


def test_a_suspended_process_is_no_hang(tmp_path: Path) -> None:
    """Ctrl-Z for longer than a hang; the clock of the backstop, in faulthandler, goes on while a process is stopped."""
    process = start(tmp_path, "be suspended, no hang")[0]
    for _ in range(2000):
        if process.pid and Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            break
        time.sleep(0.01)
    time.sleep(TIMEOUT_S + 5)  # the helper's backstop comes 4 s after a hang
    os.kill(process.pid or 0, signal.SIGCONT)
    assert end(process, tmp_path, 0, 20) == (0, "")


def test_a_process_without_its_launcher_ends() -> None:
    """A launcher that starts a monitored process and is killed."""
    launched = ("import os, time; from train.parallel.failure import monitored\n"
                "with monitored(0, 1, 60, 9): print(os.getpid(), flush=True); time.sleep(60)")
    launching = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    launcher = subprocess.Popen([sys.executable, "-c", launching, launched], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"})
    assert launcher.stdout is not None
    with launcher.stdout:
        int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        began = time.monotonic()
        assert launcher.stdout.read() == "", "the pipe closes with its last process"
    assert time.monotonic() - began < 40, "it did not sleep to its end"


def test_a_single_process_says_only_its_error() -> None:
    with pytest.raises(RuntimeError, match="gloo/transport") as raised, monitored(0, 1, 60, 9):
        enter_phase("load", 1)
        raise RuntimeError("gloo/transport")
    assert not hasattr(raised.value, "__notes__")
    with pytest.raises(OSError, match="no monitor"), reported():
        raise OSError("no monitor")


def test_every_start_has_a_prefix_of_its_own_and_all_processes_agree_on_it() -> None:
    """Whatever the starts before have left in the store, and whoever comes late."""
    store = dist.HashStore()
    prefixes: list[dict[int, str]] = []
    for late in (0, 2, 1):
        found: dict[int, str] = {}

        def join(rank: int) -> None:
            time.sleep(0.2 * (rank == late))
            found[rank] = agreed_prefix(store, rank, 3, 20.0)
        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        prefixes.append(found)
    assert [len(set(found.values())) for found in prefixes] == [1, 1, 1] and all(len(found) == 3 for found in prefixes)
    assert len({prefix for found in prefixes for prefix in found.values()}) == 3
    with pytest.raises(RuntimeError, match=r"processes \(=3\) must all start within 0.2 s, and some have not"):
        agreed_prefix(store, 1, 3, 0.2)
