"""Interleaved timing of contenders, each in a process of its own: what `make bench` measures."""
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tools.bench.contenders import CONTENDERS, Contender
from tools.bench.workers import NotAvailable, Workers
from tools.bench.workload import Photographs, Task, difference
from tools.profile.measure import Turn, Workload, interleave, run_turn, wait_idle

T = TypeVar("T")
_WARMUP = 8  # batches used up before the clock starts: more than any contender prefetches
TOLERANCE = 1.0  # grey levels, mean, between a first batch and the exact pixels: a wrong offset, flip or mean is tens
_IDLE_S = 30.0  # longest wait for a contender to come to rest


@dataclass(frozen=True)
class Result:
    """What became of one contender: its turns, or why there are none."""
    contender: Contender
    turns: tuple[Turn, ...]  # one a round; empty when it did not run
    difference: float | None = None  # grey levels between its first batch and the exact pixels; None when it makes none
    reason: str = ""  # why it did not run

    @property
    def rates(self) -> list[float]:
        """Images/s of each round."""
        return [turn.rate for turn in self.turns]

    @property
    def cpu_ms(self) -> list[float]:
        """CPU ms an image in each round."""
        return [turn.cpu_ms for turn in self.turns]


@contextmanager
def started(name: str, task: Task) -> Iterator[tuple[Workload, float | None]]:
    """A contender in its process, and how many grey levels its first batch is off. Raises NotAvailable when its package is
    missing, RuntimeError when its pixels are wrong, or it does not come to rest."""
    contender = CONTENDERS[name]
    running = contender.start(task)
    try:
        first, levels = next(running.batches), None
        if running.describe is not None:
            photographs = Photographs(task, "packed" if contender.data == "packed" else "original")
            levels = difference(photographs, running.describe(first), squares=contender.data == "decoded")
            if not levels <= TOLERANCE:
                raise RuntimeError(f"first batch lies {levels:.2f} grey levels from the exact pixels, more than {TOLERANCE}")
        _rest()
        yield Workload(name, (task.batch for _ in running.batches), _WARMUP), levels
    finally:
        running.close()


def take_turn(ready: tuple[Workload, float | None], seconds: float) -> tuple[Turn, float | None]:
    """One turn, in the process of a contender; and the difference of its first batch."""
    turn = run_turn(ready[0], seconds)
    _rest()
    return turn, ready[1]


def _rest() -> None:
    if not wait_idle(_IDLE_S):
        raise RuntimeError(f"still busy {_IDLE_S:.0f} s after its turn, so that others cannot be timed")


def measure(task: Task, names: Sequence[str], rounds: int, seconds: float) -> list[Result]:
    """Start the contenders, then let them take turns of some seconds, interleaved. Raises RuntimeError when one of ours failed. A
    peer that cannot start, or fails in a turn (most end at a corrupt image), has a reason in place of turns."""
    workers: dict[str, Workers] = {}
    reasons: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], T]) -> T | None:
        if name in reasons:
            return None
        try:
            return work()
        except RuntimeError as error:
            if CONTENDERS[name].role == "ours" and not isinstance(error, NotAvailable):
                raise
            reasons[name] = str(error)
            return None

    try:
        for name in names:
            print(f"starting {CONTENDERS[name].label} ({CONTENDERS[name].data})", file=sys.stderr, flush=True)
            if worker := attempt(name, partial(Workers, f"contender {name}", started, [(name, task)])):
                workers[name] = worker
        turns = interleave({name: partial(attempt, name, partial(worker.call, take_turn, seconds))
                            for name, worker in workers.items()}, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    answers = {name: [] if name in reasons else [answer for answer, in filter(None, turns[name])] for name in names}
    return [Result(CONTENDERS[name], tuple(turn for turn, _ in found), found[0][1] if found else None, reasons.get(name, ""))
            for name, found in answers.items()]
