"""The stages of a loader as works to be measured: each alone, the loader cut off after each, and the loader whole.

The one concept: a stage alone gets what it needs ready-made and is thrown away after; so its rate is what it could do if
everything else were free, and the CPU times of all stages add up to the loader's. The code that runs is the loader's own.

    order      ids, draws, regions          read    map the bytes and touch every page          crc       check them
    decode     DALI, of the region          resize  DALI, of decoded pixels                     colour    `Colour`
    copy       to a GPU                     hand-over   labels, `Batch`, the queue between threads

B batch, H row, W column.
"""
from __future__ import annotations

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import geometry
from pipeline.config import LoaderConfig
from pipeline.figures import EndToEnd, Stage, Together
from pipeline.graph import Bytes, DecodeGraph, Graph, Inputs, ResizeGraph
from pipeline.loader import Batch, TrainLoader
from pipeline.meter import Meter
from pipeline.reader import Reader
from pipeline.sampler import Ids
from pipeline.stream import GraphPlan, Prepared, Stream
from pipeline.turns import Turns, Work

_PAGE = 4096
_ENCODED_BYTES, _PIXEL_BYTES = 256 << 20, 384 << 20     # of ready-made inputs
_MOST_BATCHES = 16

Make = Callable[[LoaderConfig, Meter], TrainLoader]     # opens the loader that is profiled


@dataclass(frozen=True)
class Ready:
    """Inputs made beforehand.

    Attributes:
        prepared: some batches as the loader prepares them, their bytes in memory of our own.
        decoded: of the first of them, the B regions that were decoded, (H, W, 3) uint8.
        pixels: of the same, (B, S, S, 3) uint8.
    """
    prepared: list[Prepared]
    decoded: list[list[Any]]
    pixels: list[torch.Tensor]


def make_ready(loader: TrainLoader) -> Ready:
    """Prepare, decode and resize some batches of the loader, as many as fit a modest memory and at least one."""
    steps = len(loader)
    prepared: list[Prepared] = []
    held = 0
    for step in range(min(steps, _MOST_BATCHES)):
        one = loader._prepare(step)
        held += sum(view.nbytes for view in one.inputs.encoded)
        if prepared and held > _ENCODED_BYTES:
            break
        prepared.append(replace(one, inputs=replace(one.inputs, encoded=[view.copy() for view in one.inputs.encoded])))
    decoded: list[list[Any]] = []
    held = 0
    for one in prepared:
        if decoded and held > _PIXEL_BYTES:
            break
        decoded.append(_decode(loader, one))
        held += sum(int(image.nbytes) for image in decoded[-1])
    plan = _plan(loader, len(prepared[0].ids))
    with closing(plan.build(iter([one.inputs for one in prepared[:len(decoded)]]))) as graph:
        pixels = [graph.collect().clone() for _ in decoded]
    return Ready(prepared, decoded, pixels)


def _decode(loader: TrainLoader, prepared: Prepared) -> list[Any]:
    """The regions of a batch, decoded one by one."""
    rows = iter([prepared.inputs.row(row) for row in range(len(prepared.ids))])
    one = replace(loader.machine, prefetch=1)
    with closing(Graph(rows, 1, 0, resample=False, machine=one, threads=1, device_id=loader._device_id)) as graph:
        images = [graph.collect()[0].clone() for _ in prepared.ids]
    return images if loader._device_id is not None else [image.numpy() for image in images]


def _plan(loader: TrainLoader, batch: int) -> GraphPlan:
    sizes = loader._sizes(loader._ids)
    resample = bool((sizes != geometry.resized(sizes, loader.data.square_px)).any())
    return GraphPlan(batch, loader.data.crop_px, resample, loader.machine, loader._threads, loader._device_id)


def alone(loader: TrainLoader, ready: Ready, closers: ExitStack) -> list[Work]:
    """Each stage by itself, in the order of a batch's way; what they hold is closed by `closers`."""
    machine, threads = loader.machine, loader._threads
    prepared, steps = ready.prepared, range(len(ready.prepared))
    mean_bytes = float(np.mean([view.nbytes for one in prepared for view in one.inputs.encoded]))
    plan = _plan(loader, len(prepared[0].ids))
    ahead = machine.prefetch + 1
    reading = max(1, machine.read_threads)
    works = [Work("order", _endless(lambda step: _order(loader, step), steps)),
             Work("read", _pooled(_reading(loader), steps, machine.read_threads, closers), reading, None, reading, mean_bytes)]
    if machine.check_crc and bool(loader.index.header["crc32"]):
        works.append(Work("crc", _pooled(lambda step: _check(prepared[step].inputs.encoded), steps, machine.read_threads,
                                         closers), reading, None, reading, mean_bytes))
    inputs = itertools.cycle([one.inputs for one in prepared])
    decode = closers.enter_context(closing(DecodeGraph(inputs, plan.batch, plan.side_px, resample=False, machine=machine,
                                                       threads=threads, device_id=loader._device_id)))
    works.append(Work("decode", _collected(decode.collect), ahead, None, threads, mean_bytes))
    if plan.resample:
        given = itertools.cycle([(images, one.inputs.regions) for images, one in zip(ready.decoded, prepared)])
        resize = closers.enter_context(closing(ResizeGraph(given, plan.batch, plan.side_px, machine=machine, threads=threads,
                                                           device_id=loader._device_id)))
        works.append(Work("resize", _collected(resize.collect), ahead, None, threads))
    works.append(Work("colour", closers.enter_context(closing(_coloured(loader, ready))), 2, None,
                      threads if loader._device_id is None else 1))
    if loader._device_id is not None:
        works.append(Work("copy", _copied(loader, ready), 2, None, 1, mean_bytes))
    works.append(Work("hand-over", closers.enter_context(closing(_handed_over(loader, ready))), machine.queue + 1))
    return works


def _endless(work: Callable[[int], int], steps: range) -> Iterator[int]:
    return map(work, itertools.cycle(steps))


def _collected(collect: Callable[[], torch.Tensor]) -> Iterator[int]:
    while True:
        yield len(collect())


def _order(loader: TrainLoader, step: int) -> int:
    ids, epochs = loader._sampler.take(step)
    nothing: list[Bytes] = []
    return len(loader._assemble(step, ids, epochs, nothing, ids, np.zeros_like(ids)).ids)


def _reading(loader: TrainLoader) -> Callable[[int], int]:
    reader = Reader(loader.index, check_crc=False)

    def read(step: int) -> int:
        ids, _ = loader._sampler.take(step)
        reader.announce(ids)
        return sum(_touch(reader.read(int(id))) for id in ids)
    return read


def _touch(view: Bytes) -> int:
    view[::_PAGE].max()  # a byte of every page: the kernel has to have brought all of them
    return 1


def _check(encoded: list[Bytes]) -> int:
    for view in encoded:
        zlib.crc32(view.data)
    return len(encoded)


def _pooled(work: Callable[[int], int], steps: range, threads: int, closers: ExitStack) -> Iterator[int]:
    """`work` over the steps in so many threads, a batch each, as the loader reads; 0: in the caller's."""
    if threads == 0:
        return _endless(work, steps)
    pool = closers.enter_context(ThreadPoolExecutor(threads, "stage"))
    waiting: deque[Future[int]] = deque()

    def results() -> Iterator[int]:
        for step in itertools.cycle(steps):
            waiting.append(pool.submit(work, step))
            if len(waiting) > threads:
                yield waiting.popleft().result()
    return results()


def _coloured(loader: TrainLoader, ready: Ready) -> Generator[int, None, None]:
    with closing(loader._colour(loader.data.crop_px, loader._mean_image())) as colour:
        for pixels, prepared in itertools.cycle(list(zip(ready.pixels, ready.prepared))):
            planar = pixels.permute(0, 3, 1, 2)
            if loader._device_id is None:
                colour(list(planar), prepared.finish)
            else:
                colour.whole(planar, prepared.finish)
                torch.cuda.synchronize(loader.device)
            yield len(pixels)


def _copied(loader: TrainLoader, ready: Ready) -> Iterator[int]:
    """The bytes of a batch to the device, from pinned memory."""
    pinned = [torch.from_numpy(np.concatenate(one.inputs.encoded)).pin_memory() for one in ready.prepared]
    for bytes, one in itertools.cycle(list(zip(pinned, ready.prepared))):
        bytes.to(loader.device, non_blocking=True)
        torch.cuda.synchronize(loader.device)
        yield len(one.ids)


def _handed_over(loader: TrainLoader, ready: Ready) -> Generator[int, None, None]:
    """Finished images through everything that is left: labels, `Batch`, the queue and the consumer's waiting."""
    size = loader.data.crop_px
    images = torch.zeros(len(ready.prepared[0].ids), 3, size, size, device=loader.device)

    def produce() -> Generator[Batch, None, None]:
        for one in itertools.cycle(ready.prepared):
            yield loader._batch(one.step, one.ids, one.epochs, images)

    with closing(loader._start(produce())) as ahead:
        for step in itertools.count():
            yield len(loader._next(ahead, step).ids)


class _DecodePlan(GraphPlan):
    """A plan whose graph ends after the decoder."""

    def build(self, source: Iterator[Inputs]) -> Graph:
        return DecodeGraph(source, self.batch, self.side_px, resample=False, machine=self.machine, threads=self.threads,
                           device_id=self.device_id)


def cut_off(make: Make, machine: LoaderConfig, stages: list[str], closers: ExitStack) -> list[Work]:
    """The loader cut off after each of these stages but the last, everything before it included and running at once."""
    works = []
    for stage in stages:
        loader = closers.enter_context(make(replace(machine, check_crc=machine.check_crc and stage not in ("order", "read")),
                                            Meter()))
        ahead = machine.prefetch + max(1, machine.read_threads) + 2
        steps = range(len(loader))
        reading = max(1, machine.read_threads)
        if stage == "order":
            works.append(Work(stage, _endless(lambda step, loader=loader: _order(loader, step), steps)))  # type: ignore[misc]
        elif stage in ("read", "crc"):
            works.append(Work(stage, _pooled(_preparing(loader, touch=stage == "read"), steps, machine.read_threads, closers),
                              reading, None, reading))
        elif stage in ("decode", "resize", "colour"):
            works.append(Work(stage, closers.enter_context(closing(_through(loader, stage))), ahead, None, loader._threads))
    return works


def _preparing(loader: TrainLoader, *, touch: bool) -> Callable[[int], int]:
    def prepare(step: int) -> int:
        prepared = loader._prepare(step)
        if touch:
            for view in prepared.inputs.encoded:
                _touch(view)
        return len(prepared.ids)
    return prepare


def _through(loader: TrainLoader, last: str) -> Generator[int, None, None]:
    plan = _plan(loader, loader._sampler.share)
    if last == "decode":
        plan = _DecodePlan(plan.batch, plan.side_px, False, plan.machine, plan.threads, plan.device_id)
    with closing(Stream(itertools.count(), loader._prepare, loader._mend, plan, loader.meter)) as stream, \
            closing(loader._colour(loader.data.crop_px, loader._mean_image())) as colour:
        while True:
            prepared, pixels = stream.collect()
            if last == "colour":
                loader._finished(colour, prepared, pixels)
            if loader._device_id is not None:
                torch.cuda.synchronize(loader.device)
            yield len(prepared.ids)


def whole(loader: TrainLoader, name: str = "loader") -> Work:
    """The loader as anybody uses it, asked without pause."""
    return Work(name, _batches(loader, lambda batch: None), _ahead(loader), loader.meter, loader._threads)


def fed(loader: TrainLoader, consume: Callable[[Batch], None], name: str = "together") -> Work:
    """The loader feeding `consume`, which returns when it is done with a batch."""
    return Work(name, _batches(loader, consume), _ahead(loader), loader.meter, loader._threads)


def _ahead(loader: TrainLoader) -> int:
    """Batches that may be finished or under way."""
    return loader.machine.queue + loader.machine.prefetch + loader.machine.read_threads + 2


def _batches(loader: TrainLoader, consume: Callable[[Batch], None]) -> Iterator[int]:
    while True:
        for batch in loader:
            consume(batch)
            count = len(batch.ids)
            del batch
            yield count


def as_stage(work: Work, turns: Turns) -> Stage:
    """The figures of a stage's turns."""
    return Stage(work.name, tuple(turns.rates), tuple(turns.cpu_ms), work.threads, work.image_bytes)


def as_loader(turns: Turns) -> EndToEnd:
    """The figures of the whole loader's turns."""
    return EndToEnd(tuple(turns.rates), tuple(turns.cpu_ms), turns.percentiles_ms(), turns.waited, turns.causes(),
                    tuple(turns.depth), turns.rss_mb)


def as_together(turns: Turns) -> Together:
    """The figures of the loader with its consumer."""
    return Together(tuple(turns.rates), turns.waited, turns.causes())


def image_bytes(loader: TrainLoader) -> float:
    """Mean bytes of a file of the split."""
    ids: Ids = loader._ids
    sizes: npt.NDArray[np.uint32] = loader.index.samples["size"][ids]
    return float(sizes.mean())
