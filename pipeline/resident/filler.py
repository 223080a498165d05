"""`Filler`: decodes the squares that a resident store lacks, in the order in which batches will need them, ahead of need."""
import itertools
import logging
from collections import deque
from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt

from pipeline.decoding.decoder import Pixels
from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import DecodingChain
from pipeline.reading.quarantine import Policy
from pipeline.reading.source import ArchiveSource
from pipeline.resident.store import Rows, Store
from pipeline.sampling.batch_plan import BatchPlan, plan_squares
from pipeline.sampling.sampler import Ids

_log = logging.getLogger(__name__)
_PATIENCE = 16  # steps with nothing to fill, after which whatever is left is filled in the order of the rows


class Filler:
    """Fills a store through a `DecodingChain` of its own, whose steps are chunks of at most `chunk` rows. `ids` (N,): sample
    of each row, ascending. `skipped`: what the policy has left out, id → reason; it is not tried again. `complete`: fill also
    what no step needs, once the coming ones need nothing more."""

    def __init__(self, context: LoaderContext, store: Store, ids: Ids, chunk: int, policy: Policy, skipped: dict[int, str], *,
                 complete: bool) -> None:
        self._context, self._store, self._ids, self.chunk, self._skipped = context, store, ids, chunk, skipped
        self._complete = complete
        source = ArchiveSource(context.index, check_crc=context.machine.check_crc)
        settings = context.decoding(ids, chunk, context.data.square_px).by_sample()
        self._chain = DecodingChain(context, self._plan, source, policy, settings, raw=True)
        self.failed = np.zeros(len(ids), bool)  # rows that no process will fill, as all of them know
        self._planned = np.zeros(len(ids), bool)  # on their way through the chain
        self._decoded: Generator[tuple[BatchPlan, Pixels], None, None] | None = None
        self._order: Iterator[Rows] = iter(())
        self._chunks: dict[int, Rows] = {}
        self._urgent: deque[Rows] = deque()

    def rows(self, ids: Ids) -> Rows:
        return np.searchsorted(self._ids, ids).astype(np.int64)

    def expect(self, order: Iterator[Rows]) -> None:
        """The rows that the coming steps will ask for, step by step, maybe without end; pulled ahead of need."""
        self._order = order
        self._seal_if_complete()

    def fill(self, rows: Rows) -> None:
        """Afterwards each of the rows is in the store, or in `failed`. All processes that share the store ask for the same.
        Raises what the policy raises."""
        if len(damaged := self._store.check(rows)):
            names = [self._context.index.safe_name(int(id)) for id in self._ids[damaged[:5]]]
            _log.warning("resident store: %d damaged rows (wrong checksum; %s%s) are decoded again", len(damaged),
                         ", ".join(names), " …" if len(damaged) > 5 else "")
            self._planned[damaged] = False
        unknown = np.unique(rows[(self._store.have[rows] == 0) & ~self.failed[rows]])
        if len(unknown):
            self._fill_own(unknown[self._store.owned(unknown)])
            self.failed[unknown[self._store.agree(unknown, self._left_out(unknown))]] = True
            self._seal_if_complete()

    def _left_out(self, rows: Rows) -> npt.NDArray[np.bool_]:
        return np.isin(self._ids[rows], list(self._skipped))

    def _missing(self, rows: Rows) -> Rows:
        return rows[(self._store.stored[rows] == 0) & ~self._left_out(rows)]

    def _fill_own(self, rows: Rows) -> None:
        while len(missing := self._missing(rows)):
            late = missing[~self._planned[missing]]
            if len(late):  # a stand-in; what the coming steps need is planned already once the chain is at work
                self._send(late)
            if self._decoded is None:
                self._decoded = self._chain.decode(self._chunk_numbers())
            item = next(self._decoded, None)
            if item is None:
                self.close()  # all that was left then has come; what failed since is asked for anew
                continue
            self._store.put(self.rows(item[0].ids), item[1])  # type: ignore[arg-type]  # raw: pixels are a tensor

    def _send(self, rows: Rows) -> None:
        self._planned[rows] = True
        self._urgent.extend(rows[low:low + self.chunk] for low in range(0, len(rows), self.chunk))

    def _chunk_numbers(self) -> Iterator[int]:
        """Numbers of the chunks to decode; what is in one lies in `_chunks` then. Pulled by the chain, ahead of need."""
        numbers, idle = itertools.count(), 0
        for rows in itertools.chain(self._order, [np.empty(0, np.int64)]):
            found = self._unplanned(np.unique(rows))
            idle = 0 if len(found) else idle + 1
            if self._complete and idle >= _PATIENCE:
                found = self._unplanned(np.arange(len(self._ids)))[:self.chunk]
                if not len(found):
                    break
            self._send(found)
            while self._urgent:
                self._chunks[number := next(numbers)] = self._urgent.popleft()
                yield number

    def _unplanned(self, rows: Rows) -> Rows:
        rows = self._missing(rows)
        rows = rows[~self._planned[rows]]
        return rows[self._store.owned(rows)]

    def _plan(self, number: int) -> BatchPlan:
        return plan_squares(self._context.index, self._context.data.square_px, number, self._ids[self._chunks.pop(number)])

    def _seal_if_complete(self) -> None:
        if not len(self._missing(np.flatnonzero(self._store.have == 0))):
            self._store.seal()
            self.close()  # a decoder has nothing left to do, and its memory is wanted

    def close(self) -> None:
        """Free the chain's threads and decoder; what was under way is decoded again when it is needed."""
        decoded, self._decoded = self._decoded, None
        if decoded is not None:
            decoded.close()
        self._planned[:] = False
        self._chunks.clear()
        self._urgent.clear()
