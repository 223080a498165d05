"""Tier resident: the decoded squares in memory. The first epoch trains while it fills them; after it nothing is read or decoded.

The same order, draws, stand-ins and `Batch` as `TrainLoader`. Its pixels too, but for at most 5 values in a million that are one
grey level off, because the resize of a whole square adds up at other float positions than that of a crop (about 1 in a million
on photographs); with ``yuv420`` they differ as `pipeline.resident.yuv420` says. A crop is exactly the crop of the square
`TestLoader` gives.

N samples, B of a batch, S side of a square, R rows that the ranks sharing the store train on together in a step.
"""
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.decoding import geometry
from pipeline.loading.prefetch import Ahead
from pipeline.decoding.normalize import Colour, Finish
from pipeline.config import DataConfig, LoaderConfig
from pipeline.sampling.augment import Draws
from pipeline.decoding.dali import Inputs
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch, one_ahead
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Meter
from pipeline.resident.layout import Form
from pipeline.reading.source import Bytes, Quarantine, SampleError
from pipeline.sampling.sampler import Ids, Sampler
from pipeline.resident.gpu_store import SpreadStore
from pipeline.stats import Stats
from pipeline.resident.ram_store import RamStore
from pipeline.decoding.decoder import Prepared, Stream

_PATIENCE = 16  # steps with nothing to fill, after which whatever is left is filled in the order of the rows
_AT_LEAST = 64  # squares that may be decoded together, however small the batch

Places = npt.NDArray[np.int64]


class ResidentLoader(TrainLoader):
    """Training batches out of memory, `machine.resident_memory`:

    - ``ram``: a file in `machine.resident_folder` that all processes of a node map, see `RamStore`. It outlives them.
    - ``gpu``: shared out among the processes of `group`, see `SpreadStore`; in `device_id`'s memory, or else the processes'.

    Unreadable samples are replaced as in `TrainLoader`, and tried again by the next process.

    Args:
        resident: form of the squares, ``rgb`` or ``yuv420``.
        group: the node's processes, for ``gpu`` only, and for this loader alone; all of them must take the same batches. None:
            there is one process.
        The others are those of `TrainLoader`.

    Raises:
        ValueError: `data.region` is not the square; and those of `TrainLoader`.
        RuntimeError: the squares do not fit (the message names what would), the folder cannot be written; those of `TrainLoader`.
    """

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats, *,
                 resident: str = "rgb", machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1),
                 device_id: int | None = None, quarantine: Quarantine | None = None, group: dist.ProcessGroup | None = None,
                 meter: Meter | None = None) -> None:
        super().__init__(index, split, data, batch, seed, stats, machine=machine, shard=shard, device_id=device_id,
                         quarantine=quarantine, meter=meter)
        if data.region != "square":
            raise ValueError(f"data.region (={data.region}) must be square for tier resident, which keeps central squares only; "
                             "use data.tier: archives or packed")
        form = Form(resident, data.square_px, data.crop_px)
        self._store: RamStore | SpreadStore
        shards, self._group = [shard], None
        if machine.resident_memory == "ram":
            folder = Path(machine.resident_folder) if machine.resident_folder else index.path / "resident"
            self._store = RamStore(folder, split, index.split_sha256(split), len(self._ids), form,
                                   decoder="cpu" if device_id is None else "gpu", gpus=gpu_bytes())
        else:
            self._group = group
            self._store = SpreadStore(len(self._ids), form, self.device, group)
            shards = self._store.shards(shard)
        # The R rows: of each global batch those of every rank that shares the store; this rank's are at `_own` among them.
        self._global = Sampler(self._ids, batch, seed)
        taken = [np.arange(k * batch // n, (k + 1) * batch // n) for k, n in shards]
        self._taken, ends = np.concatenate(taken), list(itertools.accumulate(map(len, taken)))
        self._parts = [slice(end - len(rows), end) for rows, end in zip(taken, ends, strict=True)]
        self._own = self._parts[self._store.rank if isinstance(self._store, SpreadStore) else 0]
        self._most = max(2 * self._sampler.share, _AT_LEAST)
        self._bad = np.zeros(len(self._ids), bool)  # rows no rank will fill, as all ranks know
        self._failed = np.zeros(len(self._ids), bool)  # those this rank has found
        self._reasons: dict[int, str] = {}
        self._planned = np.zeros(len(self._ids), bool)  # on their way through the stream
        self._filling: Stream | None = None
        self._order: Iterator[Places] = iter(())
        self._chunks: dict[int, Places] = {}
        self._urgent: deque[Places] = deque()

    @property
    def filled(self) -> tuple[int, int]:
        """(rows that are in the store, rows in all)."""
        return int(np.count_nonzero(self._store.have)), len(self._ids)

    @property
    def note(self) -> str:
        """What was found wrong with a store of an earlier run, or is slower than it need be; mostly nothing."""
        if isinstance(self._store, RamStore):
            return self._store.note
        return "" if self.device.type == "cuda" else ("machine.resident_memory (=gpu) has no GPU here: the processes hold the "
                                                      "squares and exchange crops; ram would be faster")

    def fill(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the store now, instead of while training: all of it, or of `shard` (k, n) in ``ram`` the k-th part of n.

        Args:
            progress: called with (rows done, rows to do).
        """
        self.close()
        rank, ranks = self._sampler.shard if isinstance(self._store, RamStore) else (0, 1)
        todo = np.arange(rank, len(self._ids), ranks)
        pieces = [todo[low:low + self._most] for low in range(0, len(todo), self._most)]
        try:
            self._order = iter(pieces)
            for done, places in enumerate(pieces, start=1):
                self._settle(places)
                if progress is not None:
                    progress(min(done * self._most, len(todo)), len(todo))
        finally:
            self._stop_filling()
            self.meter.enter("idle")

    def close(self) -> None:
        """Free threads and buffers; the squares stay. The loader can be used again; it starts where it was."""
        super().close()
        self._store.close()

    # From here on: the batches.

    def _start(self, produce: Generator[Batch, None, None]) -> Ahead[Batch]:
        # An exchange must not run ahead of the batches consumed: a rank that stops would leave the others waiting in it.
        return super()._start(produce) if self._group is None else Ahead(produce, 0, self.meter)

    def _produce(self, first: int) -> Generator[Batch, None, None]:
        with contextlib.closing(self._colour(self.data.crop_px, self._mean_image())) as colour, \
                contextlib.ExitStack() as stack:
            stack.callback(self._stop_filling)
            pool = None
            if self._device_id is not None and isinstance(self._store, RamStore):
                pool = stack.enter_context(ThreadPoolExecutor(self.threads, "pack"))
            self._order = (self._places(self._rows(step)[0]) for step in itertools.count(first))
            self._seal_if_complete()
            yield from one_ahead(self._begin(colour, pool, step) for step in itertools.count(first))

    def _begin(self, colour: Colour, pool: ThreadPoolExecutor | None, step: int) -> Callable[[], Batch]:
        self.meter.enter("read")
        ids, epochs = self._present(step)
        images = self._images(colour, pool, ids, self.draws(ids, epochs))

        def end() -> Batch:
            self.meter.enter("colour")
            with self.meter.span("colour", step):
                made = images()
            return self._batch(step, ids[self._own], epochs[self._own], made)

        return end

    def _images(self, colour: Colour, pool: ThreadPoolExecutor | None, ids: Ids, drawn: Draws) -> Callable[[], torch.Tensor]:
        """What gives this rank's images, (B, 3, crop, crop) float32, of the R rows `ids`; threads have begun to make them."""
        places, store = self._places(ids), self._store
        finish = self._finish(drawn).rows(self._own)
        if isinstance(store, SpreadStore):
            crops = store.crops([(places[part], drawn.top[part], drawn.left[part]) for part in self._parts])
        elif pool is None:
            return colour.begin(store.crops(places, drawn.top, drawn.left), finish)
        else:
            crops = store.uploaded(places, drawn.top, drawn.left, pool, self.threads, self.device)
        return lambda: colour.whole(crops, finish)

    def _rows(self, step: int) -> tuple[Ids, Ids]:
        """Ids and epochs, both (R,), of what the ranks sharing the store train on in `step`, rank by rank."""
        ids, epochs = self._global.take(step)
        return ids[self._taken], epochs[self._taken]

    def _places(self, ids: Ids) -> Places:
        """The rows of ids in the store."""
        return np.searchsorted(self._ids, ids).astype(np.int64)

    def _present(self, step: int) -> tuple[Ids, Ids]:
        """Like `_rows`, with every sample in the store: unreadable ones replaced, as `TrainLoader` does."""
        origins, epochs = self._rows(step)
        ids, tries = origins.copy(), np.zeros_like(origins)
        while True:
            places = self._places(ids)
            self._settle(places)
            broken = np.flatnonzero(self._bad[places])
            if not len(broken):
                return ids, epochs
            for row in broken.tolist():
                reason = self._reasons.get(int(places[row]), "cannot be read by the rank that holds it")
                error = SampleError(self.index, int(ids[row]), reason)
                ids[row], tries[row] = self._stand_in(error, int(origins[row]), int(tries[row]), int(epochs[row]), step)

    # From here on: the filling.

    def _settle(self, places: Places) -> None:
        """Afterwards each of the rows is in the store, or in `_bad`. All ranks that share the store ask for the same."""
        unknown = np.unique(places[(self._store.have[places] == 0) & ~self._bad[places]])
        if len(unknown):
            self._fill_rows(unknown[self._store.mine(unknown)])
            self._bad[unknown[self._store.agree(unknown, self._failed[unknown])]] = True
            self._seal_if_complete()

    def _fill_rows(self, places: Places) -> None:
        """Afterwards each of the rows, which are this rank's to fill, is in the store or in `_failed`."""
        while True:
            missing = places[(self._store.stored[places] == 0) & ~self._failed[places]]
            if not len(missing):
                return
            late = missing[~self._planned[missing]]
            if len(late):  # a stand-in; what the coming steps need is planned already once the stream is open
                self._plan(late)
            if self._filling is None:
                self._filling = self._open(self._numbers(self._step), self._most, self.data.square_px)
            try:
                prepared, squares = self._filling.collect()
            except StopIteration:
                self._stop_filling()  # all that was left then has come; what failed since is asked for anew
                continue
            if len(prepared.ids):
                self._store.put(self._places(prepared.ids), squares)

    def _plan(self, places: Places) -> None:
        self._planned[places] = True
        self._urgent.extend(places[low:low + self._most] for low in range(0, len(places), self._most))

    def _numbers(self, first: int) -> Iterator[int]:
        """Numbers of the chunks to decode; what is in one lies in `_chunks` then. Called by the stream, ahead of need."""
        number, idle = itertools.count(first), 0
        for places in self._order:
            found = self._unplanned(np.unique(places))
            idle = 0 if len(found) else idle + 1
            if idle >= _PATIENCE:
                found = self._unplanned(np.arange(len(self._ids)))[:self._most]
                if not len(found):
                    break
            self._plan(found)
            yield from self._handed_out(number)
        yield from self._handed_out(number)

    def _handed_out(self, number: Iterator[int]) -> Iterator[int]:
        while self._urgent:
            chunk = next(number)
            self._chunks[chunk] = self._urgent.popleft()
            yield chunk

    def _unplanned(self, places: Places) -> Places:
        places = places[(self._store.stored[places] == 0) & ~self._failed[places] & ~self._planned[places]]
        return places[self._store.mine(places)]

    def _prepare(self, step: int) -> Prepared:
        ids = self._ids[self._chunks.pop(step)]
        self._reader.announce(ids)
        views: list[Bytes] = []
        kept = np.ones(len(ids), bool)
        for row, id in enumerate(ids.tolist()):
            try:
                views.append(self._reader.read(id))
            except SampleError as error:
                kept[row] = False
                self._fail(id, error.reason)
        return self._whole(step, ids[kept], views)

    def _mend(self, prepared: Prepared, row: int, reason: str) -> Prepared:
        self._fail(int(prepared.ids[row]), reason)
        return self._whole(prepared.step, np.delete(prepared.ids, row),
                           prepared.inputs.encoded[:row] + prepared.inputs.encoded[row + 1:])

    def _fail(self, id: int, reason: str) -> None:
        place = int(self._places(np.array([id]))[0])
        self._reasons[place] = reason
        self._failed[place] = True

    def _whole(self, step: int, ids: Ids, views: list[Bytes]) -> Prepared:
        """Whole squares."""
        sizes, zeros = self._sizes(ids), np.zeros_like(ids)
        resized = geometry.resized(sizes, self.data.square_px)
        regions = geometry.regions(sizes, resized, geometry.central(resized, self.data.square_px), self.data.square_px)
        flat = np.zeros(len(ids), bool)
        finish = Finish(zeros, zeros, flat, zeros, zeros, flat, np.zeros((len(ids), 3), np.float32))  # unused: they stay so
        return Prepared(step, ids, zeros, Inputs(views, regions), finish, ids, zeros)

    def _seal_if_complete(self) -> None:
        if not np.any((self._store.have == 0) & ~self._failed):
            self._store.seal()
            self._stop_filling()  # a decoder has nothing left to do, and its memory is wanted

    def _stop_filling(self) -> None:
        if self._filling is not None:
            self._filling.close()
            self._filling = None
        self._planned[:] = False
        self._chunks.clear()
        self._urgent.clear()


def gpu_bytes() -> int:
    """Memory of all GPUs of this machine."""
    return sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count()))
