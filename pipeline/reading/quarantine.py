"""Corrupt or unreadable images: replaced by another (training), skipped, or an error; those met are listed in a quarantine.

A policy takes it out of its batch: `StandIns` (training) puts another sample in its place and records it in a `Quarantine`,
`Skip` leaves it out, `refuse` raises."""
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.config import LoaderConfig
from pipeline.files import json_line, parse_line
from pipeline.index.sample_index import SampleIndex
from pipeline.io_errors import explain
from pipeline.rng import Purpose, bits
from pipeline.sampling.batch_plan import BatchPlan, Encoded
from pipeline.sampling.sampler import Ids

_ATTEMPTS = 100  # stand-ins tried for one sample; a healthy set needs one


class SampleError(RuntimeError):
    """A sample whose bytes are missing, changed or undecodable. `reason` is short, the message names the sample."""

    def __init__(self, index: SampleIndex, id: int, reason: str) -> None:
        self.id, self.reason = id, reason
        super().__init__(f"sample {id} (={index.safe_name(id)} in {index.path}) {reason}; run "
                         f"`alexnet index verify {index.path} --scrub --exclude` to leave it out")


class Pool(Protocol):
    """Samples that can be read now, and in whose place one of the same pool may stand."""
    ids: Ids

    def read(self, id: int) -> Encoded:
        """(size,) bytes of a sample, checked. Raises SampleError when they are not those that were indexed."""

    def location(self, id: int) -> dict[str, str]:
        """Where a sample lies: its `member` name and `archive`."""


# (plan, row, what is wrong with its sample, its pool) → the plan without that sample: another id in the row, or a row less.
Policy = Callable[[BatchPlan, int, SampleError, Pool], BatchPlan]


def refuse(plan: BatchPlan, row: int, error: SampleError, pool: Pool) -> BatchPlan:
    """The policy of evaluations, which count every image: raises `error`."""
    raise error


def expect_read(error: SampleError) -> None:
    """Raise RuntimeError when the sample's bytes could not be read now, which says nothing about the image."""
    if isinstance(error.__cause__, OSError):
        raise RuntimeError(f"sample {error.id}: {explain(error.__cause__)}") from error


class Skip:
    """The policy that leaves corrupt samples out and lists them; what cannot be read now is not corrupt, and a RuntimeError."""

    def __init__(self) -> None:
        self.skipped: dict[int, str] = {}

    def __call__(self, plan: BatchPlan, row: int, error: SampleError, pool: Pool) -> BatchPlan:
        expect_read(error)
        self.skipped[error.id] = error.reason
        return plan.without(row)


def quarantine_budget(machine: LoaderConfig, samples: int) -> int:
    return int(np.ceil(machine.quarantine_budget * samples))


class Quarantine:
    """The samples training could not use: named, counted, bounded: more than `budget` distinct ones stop training. `path`:
    quarantine.jsonl, or None; the samples it names count. Of several processes each writes what it finds into a file of its
    own (`process` 0 into `path`, 3 into quarantine-3.jsonl beside it), and reads the others' whenever it finds something, so
    that the budget is the whole run's."""

    def __init__(self, budget: int, path: str | Path | None = None, *, process: int = 0) -> None:
        self.budget = budget
        self.ids: set[int] = set()
        self._notice = ""  # about the first sample this process has added, until it is taken
        self._noticed, self._counted = False, 0
        self._path = None if path is None else Path(path)
        self._own = self._path and self._path.with_name(f"{self._path.stem}-{process}{self._path.suffix}" if process
                                                        else self._path.name)
        self._read: dict[Path, int] = {}  # bytes of each file that `ids` has
        self._lock = threading.Lock()
        self._catch_up()
        self._counted = len(self.ids)
        # Whether a kill has cut off the last line. It is ended only before another is written: somebody else may be writing it.
        self._is_cut_off = self._own in self._read and self._own.stat().st_size > self._read[self._own]

    def _catch_up(self) -> None:
        """Count what all files name; they only grow."""
        if self._path is None:
            return
        for path in self._path.parent.glob(f"{self._path.stem}*{self._path.suffix}"):
            start = self._read.setdefault(path, 0)
            if path.stat().st_size > start:
                with open(path, "rb") as file:
                    file.seek(start)
                    lines, _, _ = file.read().rpartition(b"\n")  # the last one may be half written
                self._read[path] += len(lines) + 1 if lines else 0
                for line in map(parse_line, lines.split(b"\n")):
                    if line is not None and type(line.get("id")) is int:  # else cut off, damaged: will be found again
                        self.ids.add(line["id"])

    def take_notice(self) -> str:
        """What to tell of the first sample that this process has added: once, else ""."""
        notice, self._notice = self._notice, ""
        return notice

    def count(self) -> tuple[int, int]:
        """Samples in quarantine, of all processes, and how many of them are new since this was asked before."""
        with self._lock:
            self._catch_up()
            before, self._counted = self._counted, len(self.ids)
            return self._counted, self._counted - before

    def add(self, error: SampleError, pool: Pool, **context: Any) -> None:
        """Record a sample of `pool`. `context` (epoch, step, substitute …) goes into its line. Raises RuntimeError when more
        samples than the budget allows have failed."""
        with self._lock:
            if error.id not in self.ids:
                self._catch_up()  # another process may have found it
            if error.id not in self.ids:
                self.ids.add(error.id)
                if not self._noticed:
                    self._noticed, self._notice = True, f"{error}; until then others stand in for it"
                if self._own is not None:
                    line = {"id": error.id, **pool.location(error.id), "reason": error.reason, **context}
                    with open(self._own, "ab") as file:
                        file.write(b"\n" * self._is_cut_off + json_line(line))
                    self._is_cut_off = False
                    self._catch_up()  # of two that find one each at the same time, one at least reads of both
            if len(self.ids) > self.budget:
                several = self._path and len(self._read) > 1
                files = self._path and (self._path.with_name(f"{self._path.stem}*{self._path.suffix}") if several else self._path)
                raise RuntimeError(f"quarantine (={len(self.ids)} unreadable samples) must not exceed its budget "
                                   f"(={self.budget}); the last one: {error}{f', all in {files}' if files else ''}; or raise "
                                   "machine.quarantine_budget") from error


@dataclass(frozen=True)
class StandIns:
    """The policy of training: another sample of the pool stands in for a corrupt one."""
    seed: int  # the run's
    quarantine: Quarantine
    plan: Callable[[int, Ids, Ids, Ids, Ids], BatchPlan]  # (step, ids, epochs, origins, attempts) → the plan of a batch
    remedy: str = ""  # what else the user may do when no stand-in can be read

    def choose(self, error: SampleError, pool: Pool, origin: int, attempts: int, epoch: int, step: int) -> tuple[int, int]:
        """The next stand-in for `origin` after so many `attempts`, and its number. `error` is what the last one suffers from.
        The n-th stand-in is a function of (seed, epoch, origin, n) and the pool, so the same comes out whenever, on whatever
        rank, and after whatever other samples the same one fails. Raises RuntimeError when it could not be read, which is no
        corruption."""
        expect_read(error)
        for attempt in range(attempts, _ATTEMPTS):
            place = bits(self.seed, Purpose.SUBSTITUTE, epoch, origin, attempt)[0] % np.uint64(len(pool.ids))
            candidate = int(pool.ids[int(place)])
            if candidate != origin:
                self.quarantine.add(error, pool, epoch=epoch, step=step, substitute=candidate)
                return candidate, attempt + 1
        raise RuntimeError(f"sample {origin} has no readable stand-in after {_ATTEMPTS} attempts among {len(pool.ids)} samples; "
                           f"the last one: {error}{self.remedy}") from error

    def __call__(self, plan: BatchPlan, row: int, error: SampleError, pool: Pool) -> BatchPlan:
        ids, attempts = plan.ids.copy(), plan.attempts.copy()
        ids[row], attempts[row] = self.choose(error, pool, int(plan.origins[row]), int(attempts[row]), int(plan.epochs[row]),
                                              plan.step)
        return self.plan(plan.step, ids, plan.epochs, plan.origins, attempts)
