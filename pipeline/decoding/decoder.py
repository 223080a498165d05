"""Prepared batches → reading threads → DALI → uint8 pixels, in order; finds and replaces the sample that breaks a batch.

B samples of a batch.
"""
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline import headroom
from pipeline.decoding.normalize import Finish
from pipeline.config import LoaderConfig
from pipeline.decoding.dali import DecodeError, Graph, Inputs
from pipeline.monitor import Meter

Ids = npt.NDArray[np.int64]
Pixels = TypeVar("Pixels")


@dataclass(frozen=True)
class Prepared:
    """A batch before its pixels.

    Attributes:
        step: number of the batch.
        ids, epochs: (B,) int64.
        inputs: what the graph eats.
        finish: what makes images of its pixels.
        origins: (B,) int64 the ids before any substitution.
        tries: (B,) int64 how many stand-ins each row has had.
    """
    step: int
    ids: Ids
    epochs: Ids
    inputs: Inputs
    finish: Finish
    origins: Ids
    tries: Ids


@dataclass(frozen=True)
class GraphPlan:
    """What the graph of a stream computes; see `Graph`."""
    batch: int
    side_px: int
    resample: bool
    machine: LoaderConfig
    threads: int
    device_id: int | None

    def build(self, source: Iterator[Inputs]) -> Graph:
        return Graph(source, self.batch, self.side_px, resample=self.resample, machine=self.machine, threads=self.threads,
                     device_id=self.device_id)


class Stream:
    """Runs batches through the graph.

    Args:
        steps: the batches' numbers, in order, maybe without end.
        prepare: step → Prepared; called ahead of need, in threads.
        mend: (Prepared, row, reason) → Prepared without the undecodable sample of that row; may raise instead.
        plan: the graph.
        meter: told whether bytes or pixels are waited for.
    """

    def __init__(self, steps: Iterable[int], prepare: Callable[[int], Prepared],
                 mend: Callable[[Prepared, int, str], Prepared], plan: GraphPlan, meter: Meter) -> None:
        self._steps = iter(steps)
        self._prepare, self._mend, self._plan, self._meter = prepare, mend, plan, meter
        self._waiting: deque[Prepared] = deque()  # pulled by DALI, not yet collected
        reading = plan.machine.read_threads
        self._pool = ThreadPoolExecutor(reading, "reader") if reading else None
        self._before: set[int] | None = headroom.threads()
        self._graph = plan.build(self._pull())

    def _pull(self) -> Iterator[Inputs]:
        self._meter.enter("read")
        for prepared in map(self._read, self._steps) if self._pool is None else self._ahead(self._pool):
            if len(prepared.ids):  # all of a batch may have been left out
                self._waiting.append(prepared)
                self._meter.enter("decode")
                yield prepared.inputs
                self._meter.enter("read")
        self._meter.enter("decode")

    def _read(self, step: int) -> Prepared:
        with self._meter.span("read", step):
            return self._prepare(step)

    def _ahead(self, pool: ThreadPoolExecutor) -> Iterator[Prepared]:
        futures: deque[Future[Prepared]] = deque()
        for step in self._steps:
            futures.append(pool.submit(self._read, step))
            if len(futures) > self._plan.machine.read_threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()

    def collect(self) -> tuple[Prepared, torch.Tensor]:
        """The next batch and its pixels, (B, S, S, 3) uint8.

        Raises:
            StopIteration: no batch is left. Whatever `prepare` or `mend` raise.
        """
        return self._next(self._graph.collect, lambda whole: whole)

    def rows(self) -> tuple[Prepared, Sequence[torch.Tensor]]:
        """The next batch and its pixels as B views (3, S, S) uint8, each to be used before the same thread asks for another.

        Raises: as `collect`.
        """
        return self._next(self._graph.rows, lambda whole: list(whole.permute(0, 3, 1, 2) if whole.dim() == 4 else whole))

    def _next(self, collect: Callable[[], Pixels], rescued: Callable[[torch.Tensor], Pixels]) -> tuple[Prepared, Pixels]:
        self._meter.enter("decode")
        try:
            with self._meter.span("decode", self._waiting[0].step if self._waiting else -1):
                pixels = collect()
        except DecodeError as error:
            prepared, whole = self._rescue(self._waiting.popleft(), error)
            return prepared, rescued(whole)
        if self._before is not None:
            self._meter.decoders |= headroom.decoders(self._before)
            self._before = None
        return self._waiting.popleft(), pixels

    def _rescue(self, prepared: Prepared, error: DecodeError) -> tuple[Prepared, torch.Tensor]:
        """Decode sample by sample: DALI does not say which one failed, and has lost the whole batch."""
        slot: list[Inputs] = []
        alone = replace(self._plan, batch=1, machine=replace(self._plan.machine, prefetch=1)).build(iter(slot.pop, None))
        rows: list[torch.Tensor] = []
        mended = False
        with contextlib.closing(alone):
            while len(rows) < len(prepared.ids):
                slot.append(prepared.inputs.row(len(rows)))
                try:
                    rows.append(alone.collect().clone())
                except DecodeError as failure:
                    prepared = self._mend(prepared, len(rows), failure.reason)
                    mended = True
        if not mended:
            raise error  # every sample decodes alone: the fault lies elsewhere
        if not rows:
            return prepared, torch.empty(0)
        return prepared, torch.cat(rows)

    def close(self) -> None:
        """Stop the threads and free the graph."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._graph.close()
