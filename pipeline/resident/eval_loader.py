"""Tests of tier resident: the squares of a split, decoded in the first pass, and read from memory in every later one.

The batches of `TestLoader`, and with ``rgb`` its images to the bit; with ``yuv420`` they are what `pipeline.resident.yuv420`
makes of them,
as the training images are.

N samples, B of a batch, S side of a square.
"""
import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.loading.batch import Batch, one_ahead
from pipeline.decoding.normalize import Colour
from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.monitor import Meter
from pipeline.resident.layout import Form
from pipeline.resident.train_loader import gpu_bytes
from pipeline.sampling.sampler import Ids
from pipeline.resident.gpu_store import SpreadStore
from pipeline.loading.eval_loader import TestLoader
from pipeline.stats import Stats
from pipeline.resident.ram_store import RamStore
from pipeline.decoding.decoder import Prepared, Stream


class ResidentTestLoader(TestLoader):
    """`TestLoader` out of memory, `machine.resident_memory`:

    - ``ram``: a file of the split, as for training: of all processes of a node, which fill it together; later runs read it.
    - ``gpu``: in `device_id`'s memory (or else the process's), the squares of this process's own batches, which are the same in
      every pass, so that none has to be exchanged; they end with the loader.

    What is missing is decoded, by whatever pass comes across it; when a pass ends nothing but the squares stays.

    Args:
        resident: form of the squares, ``rgb`` or ``yuv420``.
        keep: False for a split that is tested once: a file in ``ram`` that has all of the squares is read, and else every pass
            decodes, and nothing is stored. The images are the same.
        The others are those of `TestLoader`; a sample left out by `skip_corrupt` is not tried again.

    Raises:
        ValueError: those of `TestLoader`, another form, or `ids` that are not of the split.
        RuntimeError: the squares do not fit (the message names what would), the folder cannot be written.
    """
    __test__ = False

    def __init__(self, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats, *, resident: str = "rgb",
                 keep: bool = True, machine: LoaderConfig = LoaderConfig(), shard: tuple[int, int] = (0, 1),
                 device_id: int | None = None, skip_corrupt: bool = False, first: int = 0, ids: Ids | None = None,
                 meter: Meter | None = None) -> None:
        super().__init__(index, split, data, batch, stats, machine=machine, shard=shard, device_id=device_id,
                         skip_corrupt=skip_corrupt, first=first, ids=ids, meter=meter)
        self._form = Form(resident, data.square_px, data.square_px)  # a "crop" is the whole square here
        self._rows = index.ids(split)  # whose squares the store has rows for, ascending
        if ids is not None and not np.isin(ids, self._rows).all():
            raise ValueError(f"ids (={len(ids)} samples) must be of split {split}, whose squares are kept; leave out the others")
        self._store: RamStore | SpreadStore | None
        try:
            if machine.resident_memory == "ram":
                self._store = self._file(make=keep)
            elif keep:
                self._rows = np.unique(np.concatenate([self._rows[:0], *map(self._ids_of, self._steps)]))
                self._store = SpreadStore(len(self._rows), self._form, self.device)
            else:
                self._store = None
        except RuntimeError as error:
            if keep:
                raise RuntimeError(f"split {split}, whose squares tests keep in memory: {error}") from error
            self._store = None
        if not keep and self._store is not None and not self._store.stored.all():
            self._store = None

    def _file(self, make: bool) -> RamStore:
        folder = Path(self.machine.resident_folder) if self.machine.resident_folder else self.index.path / "resident"
        return RamStore(folder, self.split, self.index.split_sha256(self.split), len(self._rows), self._form,
                        decoder="cpu" if self._device_id is None else "gpu", gpus=gpu_bytes(), make=make)

    @property
    def filled(self) -> tuple[int, int]:
        """(squares that are in the store, squares it has room for)."""
        return (0, 0) if self._store is None else (int(np.count_nonzero(self._store.stored)), len(self._rows))

    @property
    def note(self) -> str:
        """What was found wrong with a store of an earlier run; mostly nothing."""
        return self._store.note if isinstance(self._store, RamStore) else ""

    def close(self) -> None:
        """Free threads and buffers; the squares stay. The loader can be used again."""
        super().close()
        if self._store is not None:
            self._store.close()

    def _produce(self) -> Generator[Batch, None, None]:
        if self._store is None:
            yield from super()._produce()
            return
        side = self.data.square_px
        with contextlib.ExitStack() as stack:
            colour = stack.enter_context(contextlib.closing(self._colour(side, self._mean_image())))
            pool = stream = None
            if self._device_id is not None and isinstance(self._store, RamStore):
                pool = stack.enter_context(ThreadPoolExecutor(self.threads, "pack"))
            if missing := [step for step in self._steps if len(self._wanted(step))]:
                stream = stack.enter_context(contextlib.closing(self._open(iter(missing), self._per_batch, side)))
            yield from one_ahead(self._begin_stored(self._store, colour, pool, stream))

    def _begin_stored(self, store: RamStore | SpreadStore, colour: Colour, pool: ThreadPoolExecutor | None,
                      stream: Stream | None) -> Iterator[Callable[[], Batch]]:
        for step in self._steps:
            self.meter.enter("read")
            ids = self._fill(store, stream, step)
            if len(ids):  # else all of it was left out
                yield functools.partial(self._end, step, ids, self._images(store, colour, pool, ids))
        if np.count_nonzero(store.stored) + len(self.skipped) == len(self._rows):
            store.seal()

    def _fill(self, store: RamStore | SpreadStore, stream: Stream | None, step: int) -> Ids:
        """The samples of batch `step`, (B,), all of them in the store now; without those that are left out."""
        while stream is not None and len(self._wanted(step)):
            try:
                prepared, squares = stream.collect()  # of this batch, or of an earlier one that another process was faster with
            except StopIteration:  # what is missing still was left out
                break
            if len(prepared.ids):
                store.put(self._places(prepared.ids), squares)
        ids = self._ids_of(step)
        return ids[store.stored[self._places(ids)] == 1]

    def _images(self, store: RamStore | SpreadStore, colour: Colour, pool: ThreadPoolExecutor | None,
                ids: Ids) -> Callable[[], torch.Tensor]:
        """What gives the images of stored squares, (B, 3, S, S) float32; threads have begun to make them."""
        places, corner, finish = self._places(ids), np.zeros(len(ids), np.int64), self._finish(len(ids))
        if pool is not None:
            assert isinstance(store, RamStore)
            squares = store.uploaded(places, corner, corner, pool, self.threads, self.device)
        elif isinstance(store, SpreadStore):
            squares = store.crops([(places, corner, corner)])
        if self._device_id is not None:
            return lambda: colour.whole(squares, finish)
        return colour.begin(store.crops(places, corner, corner) if isinstance(store, RamStore) else list(squares), finish)

    def _end(self, step: int, ids: Ids, images: Callable[[], torch.Tensor]) -> Batch:
        self.meter.enter("colour")
        with self.meter.span("colour", step):
            made = images()
        return self._batch(step, ids, np.zeros_like(ids), made)

    def _places(self, ids: Ids) -> npt.NDArray[np.int64]:
        """The rows of ids in the store."""
        return np.searchsorted(self._rows, ids).astype(np.int64)

    def _wanted(self, step: int) -> Ids:
        ids = self._ids_of(step)
        if self._store is None:
            return ids
        wanted = self._store.stored[self._places(ids)] == 0
        return ids[wanted & ~np.isin(ids, list(self.skipped))]

    def _collect(self, stream: Stream) -> tuple[Prepared, Sequence[torch.Tensor] | torch.Tensor]:
        """Without a store: pixels as one would give them."""
        if self._form.kind == "rgb":
            return super()._collect(stream)
        prepared, squares = stream.collect()
        which = torch.arange(len(squares), device=self.device)
        corner = torch.zeros_like(which)
        parcels = self._form.parcels(self._form.encode_all(squares), which, corner, corner)
        pixels = self._form.unpack(parcels, corner, corner)
        return prepared, list(pixels) if self._device_id is None else pixels.permute(0, 2, 3, 1)
