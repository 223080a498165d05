"""What processes of a run know of each other beside their collectives.

On a board, kept in torchrun's store: who they are, that they live, which one failed first. No call waits for another process;
only the store must answer. On the same machine also through the kernel: whether a process is there, and what it did last.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import signal
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch.distributed as dist

LEFT = "left"  # in order
PHASES = ("start", "load", "forward", "backward", "update", "save", "test", LEFT)  # in the order of a step
POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """One process of a run.

    Attributes:
        rank: its number among all.
        pid, started: what is unique on its machine; `started` in ticks since boot, as a pid may be used again.
        host: its machine's name.
        machine: what only processes that see each other's pids have in common.
        slate: its number of the file descriptor of its `Slate`.
    """

    rank: int
    pid: int
    started: int
    host: str
    machine: str
    slate: int

    @classmethod
    def this(cls, rank: int, slate: int = -1) -> Process:
        """The one that asks."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(rank, os.getpid(), _stat(os.getpid())[1], socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}",
                   slate)

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def handle(self) -> int:
        """A file descriptor that becomes readable when it ends, whatever happens to its pid. Of this machine only.

        Raises:
            ProcessLookupError: it has ended.
            OSError: this kernel has no such thing.
        """
        handle = os.pidfd_open(self.pid)
        try:
            if _stat(self.pid)[1] != self.started:
                raise ProcessLookupError(self.pid)
        except OSError:
            os.close(handle)
            raise ProcessLookupError(self.pid) from None
        return handle

    def state(self) -> str:
        """The letter that the kernel gives its state (R, S, D, T: stopped, Z: ended); empty when it is gone."""
        try:
            letter, started = _stat(self.pid)
        except OSError:
            return ""
        return letter if started == self.started else ""


def kill(handle: int) -> None:
    """SIGKILL to the process of a handle."""
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _stat(pid: int) -> tuple[str, int]:
    """State and start (ticks since boot) of a process of this machine; proc(5)."""
    words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return words[0], int(words[19])


@dataclass(frozen=True)
class Beat:
    """A sign of life: the `count`th, given at this phase of this step."""

    count: int = 0
    phase: str = "start"
    step: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come: sorts by step, then by phase."""
        return self.step, PHASES.index(self.phase)


class Slate:
    """Where a process stands, in memory that others of its machine can still read when it is gone, and that leaves no trace."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("where this process stands")
        os.ftruncate(self.handle, 8)
        self._page = mmap.mmap(self.handle, 8)
        self.write("start", 0)

    def write(self, phase: str, step: int) -> None:
        """It is now in this phase (one of PHASES) of this step."""
        struct.pack_into("q", self._page, 0, step * len(PHASES) + PHASES.index(phase))

    def close(self) -> None:
        """Write no more."""
        self._page.close()
        os.close(self.handle)

    @staticmethod
    def of(process: Process) -> int:
        """A file descriptor of the slate of a process of this machine; OSError when it is gone."""
        return os.open(f"/proc/{process.pid}/fd/{process.slate}", os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def read(handle: int) -> Beat:
        """What stands on the slate of such a descriptor."""
        step, phase = divmod(struct.unpack("q", os.pread(handle, 8, 0))[0], len(PHASES))
        return Beat(0, PHASES[phase], step)


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Attributes:
        who: failed first.
        how: did it fail: "was killed", "failed", …
        beat: its last sign of life.
        cause: its own words; empty when it had none.
        kind: told, by its own exception; gone, without a word (no failure, if it had left in order); stuck, its main thread goes
            on no more; silent, it is not even there to say so.
    """

    who: Process
    how: str
    beat: Beat = Beat()
    cause: str = ""
    kind: Literal["told", "gone", "stuck", "silent"] = "told"

    def told_by(self, rank: int, step: int) -> str:
        """One line for the process `rank`, which is at `step`."""
        mine = self.who.rank == rank
        why = f": {self.cause}" if self.cause else ""
        end = "" if mine else f"; this process ({rank}) ends at step {step}"
        end += "" if self.beat.phase == "start" else "; go on with --resume"  # before the first step there is nothing new to keep
        return (f"{f'this process ({rank})' if mine else self.who} {self.how} at step {self.beat.step} in {self.beat.phase}{why}"
                f"{end}")


def attempt(store: dist.Store, rank: int, ranks: int, timeout_s: float) -> str:
    """A name for this start of all processes, the same in all of them, that no earlier start has had; all must ask.

    torchrun's store outlives a restart, and what processes wrote before one must not be taken for new. (Its count of restarts
    does not tell them apart: it differs from machine to machine.) So each says hello with a word of its own; process 0 gathers
    the words under a name, anew as long as they change; whoever finds its word there says so; when all have, it holds.

    Raises:
        RuntimeError: not all came in this time.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"hello/{rank}", mine)
    name, hellos = "", [""] * ranks
    while True:
        if rank == 0:
            keys = [f"hello/{other}" for other in range(ranks)]
            if store.check(keys) and (found := [word.decode() for word in store.multi_get(keys)]) != hellos:
                name, hellos = uuid.uuid4().hex, found
                store.set("roster", json.dumps([name, hellos]))
        elif store.check(["roster"]):
            name, hellos = json.loads(store.get("roster"))
        if hellos[rank] == mine:
            store.set(f"here/{name}/{rank}", "")
            if rank == 0 and store.check([f"here/{name}/{other}" for other in range(ranks)]):
                store.set(f"go/{name}", "")
            if store.check([f"go/{name}"]):
                return name
        if time.monotonic() > until:
            raise RuntimeError(f"processes (={ranks}) must all start within {timeout_s:g} s, and some have not; see what they, "
                               "or torchrun on their machines, said")
        time.sleep(POLL_S)


class Board:
    """What hangs on the board. Every call asks the store once or twice.

    Args:
        store: a connection that nobody else uses, so that nobody else's waiting holds it up.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def introduce(self, process: Process) -> None:
        """Here I am."""
        self._store.set(f"process/{process.rank}", json.dumps(dataclasses.asdict(process)))

    def process(self, rank: int) -> Optional[Process]:
        """Who it is; None before it has come."""
        found = self._read(f"process/{rank}")
        return found and Process(**found)

    def beat(self, rank: int, beat: Beat) -> None:
        """Give a sign of life."""
        self._store.set(f"beat/{rank}", json.dumps(dataclasses.astuple(beat)))

    def last_beat(self, rank: int) -> Beat:
        """A process's last sign of life."""
        return Beat(*(self._read(f"beat/{rank}") or ()))

    def leave(self, rank: int) -> None:
        """I have finished in order; true for all when this returns."""
        self._store.add(f"left/{rank}", 1)
        self._store.add("left", 1)

    def has_left(self, rank: int) -> bool:
        """Whether it has finished in order."""
        return bool(self._store.check([f"left/{rank}"]))

    def all_have_left(self, ranks: int) -> bool:
        """Whether so many processes, which are all, have finished in order."""
        return self._store.add("left", 0) == ranks

    def fail(self, failure: Failure) -> Failure:
        """Report a failure. Returns the one that was reported first."""
        return _parsed(self._store.compare_set("failed", "", json.dumps(dataclasses.asdict(failure))))

    def failed(self) -> Optional[Failure]:
        """The failure that was reported first."""
        return _parsed(self._store.get("failed")) if self._store.check(["failed"]) else None


def _parsed(text: bytes) -> Failure:
    values = json.loads(text)
    return Failure(**{**values, "who": Process(**values["who"]), "beat": Beat(**values["beat"])})
