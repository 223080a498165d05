"""Watches over the processes of a run, beside what they compute, so that none waits for ever for one that is gone.

Two threads in each process: one looks after this machine (a process that ends is noticed at once, through a pidfd; a main thread
that goes on no more, after a time) and ends this process when it must; the other talks to the store (train/parallel/board.py),
and may
hang with it. Across machines processes watch each other in a ring, each its next one's signs of life: however many stop, the one
before the first of them notices. The first failure that is reported is the one that all tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import select
import sys
import threading
import time
from typing import Callable, Iterable, Iterator, Optional

import torch.distributed as dist

from train.parallel.board import LEFT, Beat, Board, Failure, Process, Slate, kill
from train.exit_codes import FAILED

TICK_S = 0.5  # between two signs of life
STORE_S = 1.0  # that the store may take to answer before a process trusts its own eyes
STUCK_S = 10.0  # … when all processes must be asked how far they have come
END_S = 3.0  # for the main thread to end by itself when another process has failed
CLOSE_S = 10.0  # … when it has failed itself
_SILENTLY = "it ended without a word, as after kill -9, a crash, or for want of memory"


class OtherFailed(RuntimeError):
    """A collective failed because another process had, which has been printed; there is nothing more to say."""


class Watch:
    """Knows what this process is doing. This one watches nobody."""

    def __init__(self) -> None:
        self.phase, self.step, self.moves = "start", 0, 0

    def at(self, phase: str, step: int) -> None:
        """Training is now in this phase (one of board.PHASES) of this step; a sign that it goes on."""
        self.phase, self.step = phase, step
        self.moves += 1

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Other processes are told at once of an exception that leaves this context."""
        yield


class Watchdog(Watch):
    """Watches from `start` to `close`.

    Args:
        rank: this process's number among all.
        ranks: how many there are.
        local: the ranks of this machine.
        board: where they meet; None for a process that is alone.
        timeout_s: a main thread that has not moved for so long is stuck; from its first move out of "start" on.
        silence_s: a process without a sign of life for so long is stuck.
        launcher: pid of torchrun, without which processes end; None when there is none.
    """

    def __init__(self, rank: int, ranks: int, local: Iterable[int], board: Optional[Board], *, timeout_s: float,
                 silence_s: float, launcher: Optional[int] = None) -> None:
        super().__init__()
        self._slate = Slate()
        self._me, self._ranks, self._board, self._launcher = Process.this(rank, self._slate.handle), ranks, board, launcher
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self._next = (rank + 1) % ranks
        self._strangers = {*local, self._next} - {rank}  # to be met; not all come at the same time
        self._handles: dict[int, Process] = {}  # pidfd to process, of this machine
        self._slates: dict[int, int] = {}  # rank to file descriptor of its slate, of this machine
        self._suspicions: list[tuple[float, Failure]] = []  # when and what; not yet seen by the board
        self._failure: Optional[Failure] = None
        self._known = threading.Event()
        self._over = threading.Event()
        self._leaving_s: Optional[float] = None  # when the main thread began to fail by itself
        self._speaking, self._spoken = threading.Lock(), False
        self._parent: Optional[int] = None
        if launcher is not None:
            with contextlib.suppress(OSError):  # no pidfd here
                self._parent = os.pidfd_open(launcher)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes the guard
        self._call = threading.Event()  # wakes the talker
        self._threads = [threading.Thread(target=self._guard, name="watchdog", daemon=True)]
        if board is not None:
            self._threads.append(threading.Thread(target=self._talk, args=(board,), name="watchdog's store", daemon=True))

    def at(self, phase: str, step: int) -> None:
        """As of `Watch`; other processes of this machine see it at once."""
        super().at(phase, step)
        self._slate.write(phase, step)

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """This process leaves in order; its end means nothing."""
        self._slate.write(LEFT, self.step)
        self._over.set()
        self._wake()
        for thread in self._threads:
            thread.join(STORE_S)
        if not any(thread.is_alive() for thread in self._threads):
            for handle in (*self._handles, *self._slates.values(), self._bell, self._parent):
                if handle is not None:
                    os.close(handle)
            self._slate.close()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Other processes are told at once of an exception that leaves this context.

        Raises:
            OtherFailed: in place of a failed collective, when another process was the cause.
        """
        try:
            yield
        except BaseException as error:
            if self._board is None or self._leaving_s is not None or isinstance(error, OtherFailed):
                raise
            if of_a_collective(error) and (other := self._blame(END_S)):
                self._say(other)
                raise OtherFailed(other.told_by(self._me.rank, self.step)) from error
            self._leaving_s = time.monotonic()
            self._suspect(Failure(self._me, "failed", self._beat(0), str(error) or type(error).__name__))
            self._known.wait(STORE_S)  # it must be on the board before this process is gone
            raise

    def _blame(self, wait_s: float) -> Optional[Failure]:
        """What befell another process; None when nothing becomes known in this time."""
        self._known.wait(wait_s)
        return None if self._failure is None or self._failure.who.rank == self._me.rank else self._failure

    def _beat(self, count: int) -> Beat:
        return Beat(count, self.phase, self.step)

    def _wake(self) -> None:
        os.eventfd_write(self._bell, 1)
        self._call.set()

    def _suspect(self, failure: Failure) -> None:
        """To be reported; it counts when the board agrees, or cannot be asked."""
        self._suspicions.append((time.monotonic(), failure))
        if self._board is None:
            self._learn(failure)
        self._wake()

    def _learn(self, failure: Failure) -> None:
        """This is why the run ends; the first one told holds."""
        if self._failure is None:
            self._failure = failure
            self._known.set()
            self._wake()

    # The thread that talks to the store.

    def _talk(self, board: Board) -> None:
        try:
            board.introduce(self._me)
            count, heard, silent = 0, Beat(), _Lapse()
            while self._failure is None and not self._over.is_set():
                count += 1
                board.beat(self._me.rank, self._beat(count))
                self._meet(board)
                if found := board.failed() or self._judged(board):
                    return self._learn(found)
                before, heard = heard, board.last_beat(self._next)
                if silent.seconds(heard.count != before.count or heard.count == 0) > self._silence_s:
                    self._silence(board, heard)
                self._call.wait(TICK_S)
                self._call.clear()
            if self._over.is_set():
                board.leave(self._me.rank)
        except (dist.DistError, RuntimeError) as error:
            if not self._over.wait(0.1):  # in which the guard sees it, if the cause is on this machine
                self._suspect(Failure(self._me, "has lost torchrun's store", self._beat(0), str(error).partition("\n")[0]))
                self._learn(self._suspicions[0][1])

    def _meet(self, board: Board) -> None:
        """Look after processes that have come meanwhile."""
        for rank in sorted(self._strangers):
            if (process := board.process(rank)) is None:
                continue
            self._strangers.discard(rank)
            if process.machine == self._me.machine:
                try:
                    self._slates[rank] = Slate.of(process)
                    self._handles[process.handle()] = process
                    self._wake()
                except (ProcessLookupError, FileNotFoundError):
                    self._suspect(Failure(process, "was killed", cause=_SILENTLY, kind="gone"))
                except OSError:  # no pidfd here: its signs of life must do
                    pass

    def _judged(self, board: Board) -> Optional[Failure]:
        """What the board makes of a suspicion."""
        for entry in list(self._suspicions):
            failure = entry[1]
            if failure.kind == "gone" and board.has_left(failure.who.rank):
                self._suspicions.remove(entry)
                continue
            if failure.kind == "gone":
                if failure.who.rank not in self._slates:
                    failure = dataclasses.replace(failure, beat=board.last_beat(failure.who.rank))
            elif failure.kind == "stuck" and failure.who.rank == self._me.rank and self._ranks > 1:
                failure = self._last_of_all(board, failure)
            return board.fail(failure)
        return None

    def _last_of_all(self, board: Board, failure: Failure) -> Failure:
        """Who waits for another is not the one to blame: that is who has come least far."""
        beats = {rank: board.last_beat(rank) for rank in range(self._ranks)}
        rank = min(beats, key=lambda rank: (beats[rank].place, rank != self._me.rank))
        who = board.process(rank)
        return dataclasses.replace(failure, who=who, beat=beats[rank]) if who else failure

    def _silence(self, board: Board, last: Beat) -> None:
        """The next process has given no sign of life."""
        who = board.process(self._next)
        if who is None or board.has_left(self._next):
            return
        state = who.state() if who.machine == self._me.machine else ""
        how = (f"has given no sign of life for {self._silence_s:g} s"
               + (f" and is {'stopped' if state == 'T' else 'there'} (state {state})" if state else ""))
        if slate := self._slates.get(self._next):
            last = Slate.read(slate)
        self._learn(board.fail(Failure(who, how, last, kind="silent")))

    # The thread that looks after this machine.

    def _guard(self) -> None:
        poll, registered = select.poll(), {self._bell}
        poll.register(self._bell, select.POLLIN)
        if self._parent is not None:
            poll.register(self._parent, select.POLLIN)
        still, moves = _Lapse(), 0
        while self._failure is None and not self._over.is_set():
            for handle in self._handles.keys() - registered:
                poll.register(handle, select.POLLIN)
                registered.add(handle)
            for handle, _ in poll.poll(TICK_S * 1000):
                if handle == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(handle)
                    continue
                poll.unregister(handle)
                if handle in self._handles:
                    gone, beat = self._handles[handle], Slate.read(self._slates[self._handles[handle].rank])
                    if beat.phase != LEFT:
                        self._suspect(Failure(gone, "was killed", beat, _SILENTLY, "gone"))
                else:
                    self._suspect(Failure(self._me, f"has lost its launcher (torchrun, pid {self._launcher})", self._beat(0)))
            before, moves = moves, self.moves
            if still.seconds(moves != before or self.phase == "start") > self._timeout_s and self._failure is None:
                self._suspect(Failure(self._me, f"has not gone on for {self._timeout_s:g} s", self._beat(0), kind="stuck"))
                still = _Lapse()
            oldest = next(iter(self._suspicions), None)
            if oldest and time.monotonic() - oldest[0] > (STUCK_S if oldest[1].kind == "stuck" else STORE_S):
                self._learn(oldest[1])
        if self._failure is not None:
            self._end(self._failure)

    def _end(self, failure: Failure) -> None:
        """Let the main thread end by itself, if there is something that makes it; else end this process."""
        # At once: a library may end this process before its turn has come. (Who has failed by itself speaks for itself.)
        if failure.who.rank != self._me.rank and failure.kind != "told":
            _within(1.0, lambda: self._say(failure))
        if failure.kind in ("stuck", "silent"):
            _within(1.0, self._show_stacks)
        if failure.kind == "silent":
            for handle, process in list(self._handles.items()):
                if process == failure.who or process.state() == "T":
                    kill(handle)
        until = time.monotonic() + (END_S if failure.who.rank != self._me.rank else 0.0)
        while time.monotonic() < (until if self._leaving_s is None else self._leaving_s + CLOSE_S):
            if self._over.wait(0.1):
                return
        _within(1.0, lambda: self._say(failure))
        os._exit(FAILED)

    def _show_stacks(self) -> None:
        print(f"stacks of {self._me} at step {self.step} in {self.phase}:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2)

    def _say(self, failure: Failure) -> None:
        with self._speaking:
            speak, self._spoken = not self._spoken, True
        if speak:  # the line and its end at once, or those of several processes run into each other
            print(f"error: {failure.told_by(self._me.rank, self.step)}\n", end="", file=sys.__stderr__, flush=True)
        sys.stdout.flush()


class _Lapse:
    """How long something has lasted, as this process has lived it: while it was stopped itself, nothing went by."""

    def __init__(self) -> None:
        self._seconds, self._asked = 0.0, time.monotonic()

    def seconds(self, ended: bool) -> float:
        """Seconds since the last call in which it had `ended`."""
        before, self._asked = self._asked, time.monotonic()
        self._seconds = 0.0 if ended else self._seconds + min(self._asked - before, 2 * TICK_S)
        return self._seconds


def of_a_collective(error: BaseException) -> bool:
    """Whether an exception says that other processes could not be reached. gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error) or "gloo/transport" in str(error)


def _within(seconds: float, what: Callable[[], None]) -> None:
    """Do it, but wait no longer for it: what prints can hang, when nobody reads."""
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    thread.join(seconds)
