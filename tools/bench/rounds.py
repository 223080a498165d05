"""Sides take turns: each lives in a process of its own and works only when told to.

The one concept: a turn first uses up what was read ahead (so that nothing made while another side was timed is counted),
then hands over batches for some seconds against the clock, and is over when the side's threads and processes have come
to rest (full queues, no CPU used). Only then is the next side told to go.

Figures: seconds of wall time, CPU seconds of the side's whole tree of processes, images.
"""
from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.bench.workload import Material, NotAvailable, Work, difference

AHEAD = 8           # batches used up before the clock starts: more than any side reads ahead
_REST_S = 30.0      # longest wait for a side to come to rest
_START_S = 600.0    # longest wait for a side to start: it may first write a copy of the photographs


@dataclass(frozen=True)
class Turn:
    """One turn: images handed over, wall seconds, CPU seconds."""
    images: int
    seconds: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds an image."""
        return 1000 * self.cpu_s / self.images


def tree(root: int) -> list[int]:
    """Process ids of `root` and all that descend from it, by Linux's /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):     # it has ended meanwhile
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:       # grows while it is read
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def cpu_s(processes: list[int]) -> float:
    """CPU seconds used so far by living processes, all their threads, to the nanosecond."""
    total = 0.0
    for pid in processes:
        with suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)    # the clock that clock_getcpuclockid(3) gives for a process
    return total


def rest(root: int) -> None:
    """Wait until a tree of processes uses no CPU.

    Raises:
        RuntimeError: it does not come to rest.
    """
    end = time.monotonic() + _REST_S
    while time.monotonic() < end:
        processes = tree(root)
        before = cpu_s(processes)
        time.sleep(0.1)
        if cpu_s(processes) - before < 0.004:
            return
    raise RuntimeError(f"processes {tree(root)} are busy {_REST_S:.0f} s after their turn, so that others cannot be timed")


def take_turn(batches: Any, batch: int, ahead: int, seconds: float) -> Turn:
    """Use up `ahead` batches, then count those of `seconds`."""
    for _ in range(ahead):
        next(batches)
    processes = tree(os.getpid())
    before, start, count = cpu_s(processes), time.perf_counter(), 0
    while True:
        next(batches)
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return Turn(count * batch, elapsed, cpu_s(processes) - before)


def serve(pipe: Connection, name: str, work: Work) -> None:
    """The process of a side: start it, check its first batch, take turns when told to."""
    # before torch is imported: one thread a worker, and idle threads sleep
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MKL_NUM_THREADS="1")
    running = first = None
    try:
        from tools.bench.sides import BY_NAME
        side = BY_NAME[name]
        running = side.start(work)
        first = next(running.batches)
        apart = None
        if running.told is not None:
            apart = difference(Material(work, "packed" if side.data == "packed" else "original"), running.told(first),
                               work.batch)
            if not apart <= side.tolerance:
                raise RuntimeError(f"first batch lies {apart:.2f} grey levels from the exact pixels, more than {side.tolerance}")
        rest(os.getpid())
        pipe.send(("ready", apart))
        while (asked := pipe.recv()) is not None:
            turn = take_turn(running.batches, work.batch, *asked)
            rest(os.getpid())
            pipe.send(("turn", turn))
    except EOFError:    # who told it what to do is gone
        pass
    except NotAvailable as error:
        pipe.send(("not available", str(error)))
    except Exception as error:      # told to the other process, which says whose it is
        last = (str(error).strip().splitlines() or [""])[-1]    # of a worker's traceback what it ends with
        pipe.send(("failed", f"{type(error).__name__}: {last}"))
    finally:
        if running is not None:
            running.close()
        running = first = None      # worker processes end with the iterator that started them, cleanly while they are idle
        gc.collect()
        pipe.close()


def _process(pipe: Connection, name: str, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the command, which ends its sides
    serve(pipe, name, work)


class Player:
    """A side in its process, seen from outside.

    Raises:
        NotAvailable: its package is missing.
        RuntimeError: it failed, or died; the message says how.
    """

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_process, args=(other, name, work), name=f"bench {name}")
        self._process.start()
        other.close()
        try:
            self.difference: float | None = self._told(_START_S)
        except BaseException:
            self.close()
            raise

    def turn(self, seconds: float, ahead: int = AHEAD) -> Turn:
        """Let it take a turn."""
        self._pipe.send((ahead, seconds))
        told: Turn = self._told(_START_S + seconds)
        return told

    def close(self) -> None:
        """End it and the processes it started."""
        children = tree(self._process.pid)[1:] if self._process.pid and self._process.is_alive() else []
        with suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._pipe.close()

    def _told(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise RuntimeError(f"side {self.name} gave no answer for {seconds:.0f} s")
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join(5)
            raise RuntimeError(f"side {self.name} died (exit code {self._process.exitcode})") from None
        if kind == "not available":
            raise NotAvailable(content)
        if kind == "failed":
            raise RuntimeError(f"side {self.name} failed: {content}")
        return content
