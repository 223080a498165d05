"""The stages of a loader as works to be measured: each alone, the loader cut off after each, and the loader whole.

The one concept: a stage alone gets what it needs ready-made and is thrown away after; so its rate is what it could do if
everything else were free, and the CPU times of all stages add up to the loader's. The code that runs is the loader's own.

    order      ids, draws, regions          read    map the bytes and touch every page          crc       check them
    decode     DALI, of the region          resize  of decoded pixels                           colour    `Colour`
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

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.dali import Bytes, DecodeGraph, Graph, ResizeGraph
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Meter
from pipeline.reading.source import Reader
from pipeline.resident.train_loader import ResidentLoader
from pipeline.decoding.resize import Resizer
from pipeline.sampling.sampler import Ids
from pipeline.resident.ram_store import RamStore
from pipeline.decoding.decoder import GraphPlan, Prepared, Stream
from pipeline.loading.streamed_loader import StreamedLoader
from tools.profile.measure import Workload

_PAGE = 4096
_ENCODED_BYTES, _PIXEL_BYTES = 256 << 20, 384 << 20     # of ready-made inputs
_MOST_BATCHES = 16


@dataclass(frozen=True)
class Ready:
    """Inputs made beforehand.

    Attributes:
        prepared: some batches as the loader prepares them, their bytes in memory of our own.
        decoded: of the first of them, what the loader decodes of each image, (H, W, 3) uint8.
        pixels: of the same, (B, S, S, 3) uint8.
    """
    prepared: list[Prepared]
    decoded: list[list[torch.Tensor]]
    pixels: list[torch.Tensor]


def make_ready(loader: TrainLoader) -> Ready:
    """Prepare, decode and resize some batches of the loader, as many as fit a modest memory and at least one. Samples that
    cannot be decoded are replaced, as in training."""
    prepared: list[Prepared] = []
    pixels: list[torch.Tensor] = []
    decoded: list[list[torch.Tensor]] = []
    encoded_bytes = decoded_bytes = 0
    steps = range(min(len(loader), _MOST_BATCHES))
    plan = loader.plan(loader._sampler.share, loader.data.crop_px)
    with closing(Stream(steps, loader._prepare, loader._mend, plan, Meter())) as stream:
        for _ in steps:
            one, resized = stream.collect()
            encoded_bytes += sum(view.nbytes for view in one.inputs.encoded)
            if prepared and encoded_bytes > _ENCODED_BYTES:
                break
            prepared.append(replace(one, inputs=replace(one.inputs, encoded=[view.copy() for view in one.inputs.encoded])))
            if not decoded or decoded_bytes < _PIXEL_BYTES:
                decoded.append(_decode(loader, one))
                decoded_bytes += sum(int(image.nbytes) for image in decoded[-1])
                pixels.append(resized.clone())
    return Ready(prepared, decoded, pixels)


def _decode(loader: TrainLoader, prepared: Prepared) -> list[torch.Tensor]:
    """What the loader decodes of each image of a batch, decoded one by one."""
    inputs = prepared.inputs
    if loader._device_id is None:   # from the image's corner, see pipeline/decoding/resize.py
        regions = inputs.regions
        inputs = replace(inputs, regions=replace(regions, anchor=np.zeros_like(regions.anchor), shape=regions.reach))
    rows = iter([inputs.row(row) for row in range(len(prepared.ids))])
    one = replace(loader.machine, prefetch=1)
    with closing(Graph(rows, 1, 0, resample=False, machine=one, threads=1, device_id=loader._device_id)) as graph:
        return [graph.collect()[0].clone() for _ in prepared.ids]


def alone(loader: TrainLoader, closers: ExitStack) -> list[Workload]:
    """Each stage by itself, in the order of a batch's way; what they hold is closed by `closers`.

    Tier resident has no reading and decoding once it is filled, which it must be. Where batches are cut out of RAM for a
    GPU, that is the copy.
    """
    if isinstance(loader, ResidentLoader):
        return _resident(loader, closers)
    streamed = isinstance(loader, StreamedLoader)
    machine, threads = loader.machine, loader.threads
    plain = loader if not streamed else closers.enter_context(_plain(loader))
    ready = make_ready(plain)
    prepared, steps = ready.prepared, range(len(ready.prepared))
    mean_bytes = float(np.mean([view.nbytes for one in prepared for view in one.inputs.encoded]))
    plan = loader.plan(len(prepared[0].ids), loader.data.crop_px)
    reading = max(1, machine.read_threads)
    works: list[Workload] = []
    if not streamed:    # else its reading draws the order itself, see tools/profile/cutoff.py
        works = [Workload("order", _endless(lambda step: _order(loader, step), steps)),
                 Workload("read", pooled(_reading(loader), steps, machine.read_threads, closers), reading, None, reading,
                          mean_bytes)]
    if machine.check_crc and bool(loader.index.header["crc32"]):
        works.append(Workload("crc", pooled(lambda step: _check(prepared[step].inputs.encoded), steps, machine.read_threads,
                                            closers), reading, None, reading, mean_bytes))
    inputs = itertools.cycle([one.inputs for one in prepared])
    decode = closers.enter_context(closing(DecodeGraph(inputs, plan.batch, plan.side_px, resample=plan.resample,
                                                       machine=machine, threads=threads, device_id=loader._device_id)))
    works.append(Workload("decode", _collected(decode.collect, loader.device), machine.prefetch + 1, None, threads, mean_bytes))
    if plan.resample:
        works.append(Workload("resize", _resized(loader, plan, ready, closers), machine.prefetch + 1, None, threads))
    works.append(Workload("colour", closers.enter_context(closing(_coloured(loader, ready))), 2, None,
                          threads if loader._device_id is None else 1))
    if loader._device_id is not None:
        works.append(Workload("copy", _copied(loader, ready), 2, None, 1, mean_bytes))
    return [*works, _hand_over(loader, [(one.step, one.ids, one.epochs) for one in prepared], closers)]


def _plain(loader: TrainLoader) -> TrainLoader:
    """A loader of the same shards that reads anywhere."""
    return TrainLoader(loader.index, loader.split, loader.data, loader._sampler.batch, loader._seed, loader._stats,
                       machine=loader.machine, device_id=loader._device_id)


def _resident(loader: ResidentLoader, closers: ExitStack) -> list[Workload]:
    steps = range(min(len(loader), _MOST_BATCHES))
    colour = closers.enter_context(closing(loader._colour(loader.data.crop_px, loader._mean_image())))
    uploading = loader._device_id is not None and isinstance(loader._store, RamStore)
    pool = closers.enter_context(ThreadPoolExecutor(loader.threads, "pack")) if uploading else None
    taken = [(step, *loader._present(step)) for step in steps]

    def order(step: int) -> int:
        ids, epochs = loader._present(step)
        loader._finish(loader.draws(ids, epochs))
        return len(ids)

    def coloured(step: int) -> int:
        _, ids, epochs = taken[step]
        loader._images(colour, pool, ids, loader.draws(ids, epochs))()
        arrived(loader.device)
        return len(ids)

    return [Workload("order", _endless(order, steps)),
            Workload("copy" if uploading else "colour", _endless(coloured, steps), 2, None, loader.threads),
            _hand_over(loader, taken, closers)]


def _endless(work: Callable[[int], int], steps: range) -> Iterator[int]:
    return map(work, itertools.cycle(steps))


def _collected(collect: Callable[[], torch.Tensor], device: torch.device) -> Iterator[int]:
    while True:
        count = len(collect())
        arrived(device)
        yield count


def arrived(device: torch.device) -> None:
    """Wait until what this thread was given is there: on a GPU it may still be on its way; what is made ahead goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _order(loader: TrainLoader, step: int) -> int:
    ids, epochs = loader._sampler.take(step)
    nothing: list[Bytes] = []
    return len(loader._assemble(step, ids, epochs, nothing, ids, np.zeros_like(ids)).ids)


def _reading(loader: TrainLoader) -> Callable[[int], int]:
    reader = Reader(loader.index, check_crc=False)

    def read(step: int) -> int:
        ids, _ = loader._sampler.take(step)
        reader.announce(ids)
        return sum(touch(reader.read(int(id))) for id in ids)
    return read


def touch(view: Bytes) -> int:
    """Look at a byte of every page, so that the kernel has to have brought all of them; gives 1, the image."""
    view[::_PAGE].max()
    return 1


def _check(encoded: list[Bytes]) -> int:
    for view in encoded:
        zlib.crc32(view.data)
    return len(encoded)


def pooled(work: Callable[[int], int], steps: range, threads: int, closers: ExitStack) -> Iterator[int]:
    """`work` over the steps, again and again, in so many threads, a batch each, as the loader reads; 0: in the caller's."""
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


def _resized(loader: TrainLoader, plan: GraphPlan, ready: Ready, closers: ExitStack) -> Iterator[int]:
    given = itertools.cycle([(images, one.inputs.regions) for images, one in zip(ready.decoded, ready.prepared)])
    if plan.device_id is None:
        resizer = closers.enter_context(closing(Resizer(plan.side_px, plan.threads)))
        return _collected(lambda: resizer(*next(given)), loader.device)
    graph = ResizeGraph(given, plan.batch, plan.side_px, machine=plan.machine, threads=plan.threads, device_id=plan.device_id)
    return _collected(closers.enter_context(closing(graph)).collect, loader.device)


def _coloured(loader: TrainLoader, ready: Ready) -> Generator[int, None, None]:
    with closing(loader._colour(loader.data.crop_px, loader._mean_image())) as colour:
        for pixels, prepared in itertools.cycle(list(zip(ready.pixels, ready.prepared))):
            planar = pixels.permute(0, 3, 1, 2)
            if loader._device_id is None:
                colour(list(planar), prepared.finish)
            else:
                colour.whole(planar, prepared.finish)
                arrived(loader.device)
            yield len(pixels)


def _copied(loader: TrainLoader, ready: Ready) -> Iterator[int]:
    """The bytes of a batch to the device, from pinned memory."""
    pinned = [torch.from_numpy(np.concatenate(one.inputs.encoded)).pin_memory() for one in ready.prepared]
    for bytes, one in itertools.cycle(list(zip(pinned, ready.prepared))):
        bytes.to(loader.device, non_blocking=True)
        arrived(loader.device)
        yield len(one.ids)


def _hand_over(loader: TrainLoader, taken: list[tuple[int, Ids, Ids]], closers: ExitStack) -> Workload:
    """Finished images through everything that is left: labels, `Batch`, the queue and the consumer's waiting."""
    size = loader.data.crop_px
    images = torch.zeros(len(taken[0][1]), 3, size, size, device=loader.device)

    def produce() -> Generator[Batch, None, None]:
        for step, ids, epochs in itertools.cycle(taken):
            yield loader._batch(step, ids, epochs, images)

    ahead = closers.enter_context(closing(loader._start(produce())))
    return Workload("hand-over", (len(loader._next(ahead, step).ids) for step in itertools.count()), loader.machine.queue + 1)


def end_to_end(loader: TrainLoader, name: str = "loader") -> Workload:
    """The loader as anybody uses it, asked without pause."""
    return Workload(name, _batches(loader, lambda batch: None), _ahead(loader), loader.meter, loader.threads)


def fed(loader: TrainLoader, consume: Callable[[Batch], None], name: str = "together") -> Workload:
    """The loader feeding `consume`, which returns when it is done with a batch."""
    return Workload(name, _batches(loader, consume), _ahead(loader), loader.meter, loader.threads)


def _ahead(loader: TrainLoader) -> int:
    """Batches that may be finished or under way."""
    return loader.machine.queue + loader.machine.prefetch + loader.machine.read_threads + 2


def _batches(loader: TrainLoader, consume: Callable[[Batch], None]) -> Iterator[int]:
    while True:
        for batch in loader:
            consume(batch)
            arrived(loader.device)
            count = len(batch.ids)
            del batch
            yield count


def image_bytes(loader: TrainLoader) -> float:
    """Mean bytes of a file of the split."""
    ids: Ids = loader._ids
    sizes: npt.NDArray[np.uint32] = loader.index.samples["size"][ids]
    return float(sizes.mean())
