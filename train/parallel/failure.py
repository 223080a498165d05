"""What a run under torchrun still needs when a process fails: where it stood, and an end of those that hang.

torchrun ends all processes of a machine when one has ended with an error, restarts them (`--max-restarts`), and prints the file
that TORCHELASTIC_ERROR_FILE names for each failed process. Collectives raise when a peer's connection closes, or after
`machine.timeout_s`. torch (2.13) leaves open what this module does, by the kernel and by those files, without messages between
processes:

* A process that is killed says nothing. So each keeps rank, step and phase in its error file while it lives: torchrun's report
  shows them, and processes of the same machine whose collectives fail read them to name the cause.
* torchrun waits 30 s, a constant, for a process that does not heed SIGTERM. So whoever waits longer than `machine.silence_s`
  kills a stopped (SIGSTOP) process of its machine, and one that hears torchrun's SIGTERM in a collective ends within GRACE_S.
* Nothing limits loading, computing or writing. A phase that takes longer than `machine.timeout_s` ends the process, with the
  stacks of all its threads.
* Workers outlive a killed torchrun. The kernel sends them SIGTERM then: they save and stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, Iterator, Optional

import torch.distributed as dist

from train.exit_codes import FAILED

TICK_S = 0.5  # between two looks at the main thread's progress
GRACE_S = 8.0  # for a process to end by itself once it, or another of its machine, has failed
NAMING_S = 2.0  # for the process that made a collective fail to be gone, so that it can be named
BACKSTOP_S = 5.0  # after timeout_s, when even the monitor's thread cannot run
ARM_S = 1.0  # arming faulthandler starts a thread (0.1 ms): not for each phase of a fast step
PR_SET_PDEATHSIG = 1  # prctl(2)


class PeerFailed(RuntimeError):
    """A collective failed because another process of this machine had; names that process, its step and the cause."""


def is_collective_error(error: BaseException) -> bool:
    """Whether an exception says that other processes could not be reached. gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error) or "gloo/transport" in str(error)


def enter_phase(phase: str, step: Optional[int] = None) -> None:
    """Training now enters this phase (load, forward, backward, update, save, test) of a step, by default of the same one."""
    if _Monitor.active is not None:
        _Monitor.active.enter(phase, step)


def position_of(error: Exception) -> str:
    """Rank, step and phase in which an error was raised, as `reported` notes them, before a colon; empty for one process."""
    return "".join(f"{note}: " for note in getattr(error, "__notes__", ()))


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """An exception that leaves this context is put into torchrun's report, and this process ends soon, whatever hangs.

    Several processes: the exception's notes say rank, step and phase.

    Raises:
        PeerFailed: in place of a failed collective, when the cause is known.
    """
    try:
        yield
    except Exception as error:
        cause = _Monitor.active.failed(error) if _Monitor.active is not None else error
        if cause is error:
            raise
        raise cause from error


@contextlib.contextmanager
def monitored(rank: int, world_size: int, timeout_s: float, silence_s: float) -> Iterator[None]:
    """Monitor this process; as of this module's docstring."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    monitor = _Monitor.active = _Monitor(rank, world_size, timeout_s, silence_s)
    try:
        with reported():
            yield
    finally:
        _Monitor.active = None
        monitor.close()


class _Monitor:
    """Rank, step and phase of this process, kept in torchrun's error file, and a thread that looks for hangs."""

    active: Optional[_Monitor] = None

    def __init__(self, rank: int, world_size: int, timeout_s: float, silence_s: float) -> None:
        self._rank, self._world_size, self._timeout_s, self._silence_s = rank, world_size, timeout_s, silence_s
        self._phase, self._step, self._moves = "start", 0, 0
        self._armed, self._ending, self._closed = 0.0, False, False
        name = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._path = Path(name) if name else None
        self._file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if name else None
        self._write()
        self._signals, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)  # tells of a signal while the main thread is inside a library
        self._thread = threading.Thread(target=self._watch, name="failure monitor", daemon=True)
        self._thread.start()

    @property
    def position(self) -> str:
        """Where this process stands."""
        return f"rank {self._rank} " + (f"at step {self._step} in {self._phase}" if self._phase != "start" else "at the start")

    def enter(self, phase: str, step: Optional[int]) -> None:
        """As of the function above."""
        self._phase, self._step, self._moves = phase, self._step if step is None else step, self._moves + 1
        self._write()
        if time.monotonic() - self._armed > ARM_S and not self._ending:
            self._armed = time.monotonic()
            self._end_after(self._timeout_s + BACKSTOP_S)

    def failed(self, error: Exception) -> Exception:
        """An exception ends this process: report it. Returns what to raise."""
        if self._ending:
            return error
        self._ending = True  # others wait for this process, and what it closes may wait for them
        self._end_after(GRACE_S)
        if is_collective_error(error) and (cause := self._cause()):
            error = PeerFailed(f"{cause}; {self.position} ends")
        elif self._world_size > 1:
            error.add_note(self.position)
        self._write(str(error) or type(error).__name__)
        return error

    def close(self) -> None:
        """Monitor no more."""
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(-1)
        self._closed = True
        os.write(self._wake, b"\0")
        self._thread.join()
        for handle in (self._signals, self._wake, self._file):
            if handle is not None:
                os.close(handle)

    @staticmethod
    def _end_after(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # a thread in C, which needs no Python

    def _write(self, cause: str = "") -> None:
        """The line of this process in torchrun's report; overwritten in one call, since torchrun may read it at any time."""
        if self._file is not None:
            record = {"message": f"{self.position}: {cause}" if cause else self.position, "timestamp": time.time(),
                      "pid": os.getpid(), "failed": bool(cause)}
            with contextlib.suppress(OSError):  # a full disk
                text = json.dumps(record).encode()
                os.pwrite(self._file, text.ljust(256), 0)

    def _peers(self) -> list[dict[str, Any]]:
        """Records of this machine's processes, torchrun's report of each; the one first that has moved least recently."""
        records = []
        for path in self._path.parent.parent.glob("*/error.json") if self._path is not None else ():
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text(encoding="utf-8"))
                records.append({"path": path, "state": _state(record["pid"]), **record})
        return sorted(records, key=lambda record: record["timestamp"])

    def _cause(self) -> str:
        """Rank, step and cause of the first process of this machine that has failed; empty when none has."""
        until = time.monotonic() + NAMING_S
        while time.monotonic() < until:
            for record in self._peers():
                if record["failed"]:
                    return str(record["message"])
                if not record["state"]:
                    return f"{record['message']}: it ended without a word, as after kill -9, a crash or for want of memory"
            time.sleep(0.05)
        return ""

    def _watch(self) -> None:
        """The thread. It counts ticks, not seconds: while this process itself is stopped no time goes by."""
        still, moves = 0, 0
        while True:
            heard = os.read(self._signals, 64) if select.select([self._signals], [], [], TICK_S)[0] else b""
            if self._closed:
                return
            if signal.SIGTERM in heard and any(not record["state"] for record in self._peers()):
                self._ending = True
                self._end_after(GRACE_S)
            still, moves = (still + 1 if moves == self._moves else 0), self._moves
            if still * TICK_S > self._silence_s:
                self._kill_stopped()
            if still * TICK_S > self._timeout_s and self._phase != "start" and not self._ending:
                self._stuck()

    def _kill_stopped(self) -> None:
        for record in self._peers():
            if record["state"] == "T" and not record["failed"]:
                record["message"] += f": stopped (SIGSTOP) for {self._silence_s:g} s (machine.silence_s), and killed"
                record["path"].write_text(json.dumps({key: record[key] for key in ("message", "timestamp", "pid")}
                                                     | {"failed": True}), encoding="utf-8")
                os.kill(record["pid"], signal.SIGKILL)

    def _stuck(self) -> None:
        """End this process, blaming whichever of this machine has moved least recently: the others wait for it."""
        oldest = next((record["message"] for record in self._peers()), self.position)
        cause = f"no progress for {self._timeout_s:g} s (machine.timeout_s)"
        self._write(cause)
        text = f"error: {oldest}: {cause}; {self.position} ends. The stacks of its threads:\n"
        os.write(2, text.encode())
        faulthandler.dump_traceback(2)
        os._exit(FAILED)


def _state(pid: int) -> str:
    """The letter proc(5) gives the state of a process that this process's launcher started; empty when it has ended."""
    try:
        letter, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return ""
    return letter if int(parent) == os.getppid() and letter not in "ZX" else ""
