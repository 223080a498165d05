"""Hung, stopped and killed processes of a run: timeouts, reports, ends; torchrun restarts them (docs/multi-node.md).

torchrun ends all processes of a machine when one has ended with an error, and prints for each the file that its variable
TORCHELASTIC_ERROR_FILE names. Collectives fail when a peer's connection closes, or after `machine.timeout_s`. What torch (2.13)
leaves open is done here, by those files and /proc, on each machine by itself:

* A killed process reports nothing. So each keeps its rank, step and phase in its error file: torchrun prints them, and processes
  whose collectives fail take the cause from there.
* torchrun waits 30 s, a constant, for a process that does not end on SIGTERM: stopped (SIGSTOP), or waiting on a GPU for a peer
  that is gone. So the others kill a stopped process after `machine.silence_s`, and one that waits for a failed one ends itself.
* Nothing limits loading, computing or writing: a phase that takes longer than `machine.timeout_s` ends the process, with the
  stacks of all its threads.
* Processes outlive a killed torchrun: then the kernel sends them SIGTERM, so that they save and stop.
"""
import contextlib
import ctypes
import faulthandler
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Optional

import torch.distributed as dist

from train.exit_codes import FAILED

TICK_S = 0.5  # between two looks at the main thread's progress
GRACE_S = 6.0  # for a process to end by itself once it, or another of its machine, has failed
NAMING_S = 2.0  # for the process that made a collective fail to be gone
ARM_S = 1.0  # arming faulthandler starts a thread (0.1 ms), so not in each phase of a fast step
BACKSTOP_S = 5.0  # later faulthandler ends a process whose monitor cannot run, as a library holds Python's lock
PR_SET_PDEATHSIG = 1  # prctl(2)


def is_collective_error(error: BaseException) -> bool:
    """Whether an exception says that other processes could not be reached. gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error) or "gloo/transport" in str(error)


def enter_phase(phase: str, step: Optional[int] = None) -> None:
    """Training enters this phase of a step, by default of the same one: load, forward, backward, update (or captured step),
    device wait (for results of steps begun before), save, test."""
    if _Monitor.active is not None:
        _Monitor.active.enter(phase, step)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Put an exception that leaves this context into torchrun's report, and limit the time that this process takes to end. In
    place of a failed collective raises RuntimeError, naming the process that failed first, its step and the cause."""
    try:
        yield
    except Exception as error:
        cause = _Monitor.active.fail(error) if _Monitor.active is not None else ""
        if not cause:
            raise
        raise RuntimeError(cause) from error


@contextlib.contextmanager
def monitored(rank: int, world_size: int, timeout_s: float, silence_s: float) -> Iterator[None]:
    """Monitor this process, as this module's docstring says."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    monitor = _Monitor.active = _Monitor(rank, world_size, timeout_s, silence_s)
    catches = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
    if catches:
        signal.signal(signal.SIGTSTP, monitor.suspend)
    try:
        with reported():
            yield
    finally:
        if catches:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        _Monitor.active = None
        monitor.close()


class _Monitor:
    """Where this process is, kept in its error file, and a thread that looks for hangs."""
    active: Optional["_Monitor"] = None

    def __init__(self, rank: int, world_size: int, timeout_s: float, silence_s: float) -> None:
        self._rank, self._world_size, self._timeout_s, self._silence_s = rank, world_size, timeout_s, silence_s
        self._phase, self._step, self._phases, self._armed = "start", 0, 0, 0.0
        self._limit_s, self._ending, self._failed = math.inf, False, False
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._folder = Path(path).parent.parent if path else None  # it has a folder for each local rank
        self._file = os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._write("runs")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure monitor", daemon=True)
        self._thread.start()

    @property
    def _position(self) -> str:
        return f"rank {self._rank} " + (f"at step {self._step} in {self._phase}" if self._phases else "at the start")

    def enter(self, phase: str, step: Optional[int]) -> None:
        self._phase, self._step, self._phases = phase, self._step if step is None else step, self._phases + 1
        self._write("runs")
        if time.monotonic() - self._armed > ARM_S and not self._ending:
            self._armed = time.monotonic()
            self._limit(self._timeout_s)

    def suspend(self, number: int, frame: Optional[FrameType]) -> None:
        """Stop, as Ctrl-Z or a batch system asks; faulthandler's clock, which goes on meanwhile, begins anew when this does."""
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._limit_s < math.inf:
            self._limit(self._limit_s)

    def fail(self, error: Exception) -> str:
        """Report an exception that ends this process. Returns what to raise in its place, or nothing."""
        if self._failed:
            return ""
        self._phases, self._ending = self._phases + 1, True
        self._limit(GRACE_S)  # others wait for this process, and what it closes may wait for them
        cause, until = "", time.monotonic() + NAMING_S
        while is_collective_error(error) and not cause and time.monotonic() < until:
            time.sleep(0.05)
            cause = next(iter(self._failures()), "")
        if not cause and self._world_size > 1:
            error.add_note(self._position)
        self._write("failed", cause or f"{self._position}: {error or type(error).__name__}")
        self._failed = True
        return cause and f"{cause}; {self._position} ends; resume with --resume"

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()
        self._write("left", f"{self._position}: no error, it ended as it was asked to")  # torchrun prints it after exit code 75
        os.close(self._file)

    def _limit(self, seconds: float) -> None:
        """End this process when it enters no other phase for so long."""
        self._limit_s = seconds
        faulthandler.dump_traceback_later(seconds + BACKSTOP_S, exit=True, file=2)

    def _write(self, state: str, message: str = "") -> None:
        """Overwrite the report in one call, as it may be read at any time."""
        if not self._failed:
            report = {"message": message or self._position, "timestamp": time.time(), "pid": os.getpid(), "state": state,
                      "phases": self._phases}
            with contextlib.suppress(OSError):  # a full disk
                os.pwrite(self._file, json.dumps(report).ljust(256).encode(), 0)

    def _peers(self) -> list[dict[str, Any]]:
        """Reports of this machine's processes, first of the one that entered its phase first; `proc`: state as of proc(5)."""
        reports = []
        for path in self._folder.glob("*/error.json") if self._folder else ():
            with contextlib.suppress(OSError, ValueError):
                report = json.loads(path.read_text(encoding="utf-8"))
                reports.append({"path": path, "proc": _proc_state(report["pid"]), **report})
        return sorted(reports, key=lambda report: report["timestamp"])

    def _failures(self) -> list[str]:
        """Messages of the processes that have failed, the first one first."""
        return [report["message"] + ("" if report["state"] == "failed" else ": ended without an error, as after kill -9, in a "
                                     "crash, or for want of memory")
                for report in self._peers() if report["state"] == "failed" or report["state"] == "runs" and not report["proc"]]

    def _watch(self) -> None:
        """The thread. It counts ticks, not seconds: while this process itself is stopped, none go by."""
        ticks, phases = 0, 0
        while not self._closed.wait(TICK_S):
            ticks, phases = (ticks + 1 if phases == self._phases else 0), self._phases
            waited_s = ticks * TICK_S
            if waited_s > 2 * TICK_S and not self._ending and self._failures():
                self._ending = True
                self._limit(min(self._limit_s, waited_s + GRACE_S))
            if waited_s > self._silence_s:
                self._kill_stopped()
            if waited_s > self._limit_s:
                self._give_up()

    def _kill_stopped(self) -> None:
        for report in self._peers():
            if report["state"] == "runs" and report["proc"] == "T":
                path, pid = report.pop("path"), report["pid"]
                report["message"] += f": stopped (SIGSTOP) for {self._silence_s:g} s (machine.silence_s), and killed"
                path.write_text(json.dumps({**report, "state": "failed"}), encoding="utf-8")
                os.kill(pid, signal.SIGKILL)

    def _give_up(self) -> None:
        """End this process. Of processes that hang, the one that has entered fewest phases, and its last one first, is named: the
        others wait for it."""
        running = [report for report in self._peers() if report["state"] == "runs"]
        slowest = min(running, key=lambda report: report["phases"], default={"message": self._position})["message"]
        cause = next(iter(self._failures()), f"{slowest}: no progress for {self._timeout_s:g} s (machine.timeout_s)")
        self._write("failed", cause)
        os.write(2, f"error: {cause}; {self._position} ends. The stacks of its threads:\n".encode())
        faulthandler.dump_traceback(2)
        os._exit(FAILED)


def _proc_state(pid: int) -> str:
    """The letter of a process's state (proc(5)); empty when it has ended, or was not started by this process's launcher."""
    try:
        letter, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return ""
    return letter if int(parent) == os.getppid() and letter not in "ZX" else ""
