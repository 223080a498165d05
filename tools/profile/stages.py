"""The stages of a loader as workloads: each alone, and the loader end to end.

A stage alone gets its inputs ready-made and its outputs are thrown away; so its rate is what it could do if everything else were
free, and the CPU times of all stages add up to the loader's. The code that runs is the loader's own, through its `Chain`.

    order      ids, crops, regions          read    map the bytes and touch every page          crc          check them
    decode     DALI, of the region          resize  of decoded pixels, on a CPU                 normalize    `Normalizer`
    copy       to a GPU                     hand-over   labels, `Batch`, the queue between threads

B batch, H row, W column.
"""
from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from pipeline.decoding.dali import Graph
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.resize import Resizer
from pipeline.loading.batch import Batch
from pipeline.loading.chain import DecodingChain
from pipeline.loading.prefetch import Prefetcher, ahead_in_threads
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.reading.source import ArchiveSource
from pipeline.resident.chain import ResidentChain
from pipeline.sampling.batch_plan import BatchPlan, Bytes
from pipeline.sampling.sampler import Ids
from tools.profile.measure import Workload

_PAGE = 4096
_ENCODED_BYTES, _PIXEL_BYTES = 256 << 20, 384 << 20     # of ready-made inputs
_MOST_BATCHES = 16


@dataclass(frozen=True)
class Ready:
    """Inputs made beforehand.

    Attributes:
        plans: some batches of the loader, their bytes in memory of our own.
        decoded: of the first of them, what a CPU decodes of each image, (H, W, 3) uint8; empty for a GPU.
        pixels: of the same, (B, S, S, 3) uint8.
    """
    plans: list[BatchPlan]
    decoded: list[list[torch.Tensor]]
    pixels: list[torch.Tensor]


def make_ready(loader: TrainLoader) -> Ready:
    """Read, decode and resize some batches of the loader, as many as fit a modest memory and at least one. Samples that
    cannot be decoded are replaced, as in training."""
    chain, ready = cast(DecodingChain, loader.chain), Ready([], [], [])
    encoded_bytes = pixel_bytes = 0
    with closing(chain.read(range(min(len(loader), _MOST_BATCHES)))) as plans, \
            closing(Decoder(plans, chain.graph, chain.reader.recover, Monitor(), whole=True)) as decoder:
        for plan, pixels in decoder:
            encoded_bytes += sum(view.nbytes for view in plan.encoded)
            if ready.plans and encoded_bytes > _ENCODED_BYTES:
                break
            ready.plans.append(replace(plan, encoded=[view.copy() for view in plan.encoded]))
            if not ready.pixels or pixel_bytes < _PIXEL_BYTES:
                ready.decoded.append(_decode(chain, plan) if loader.device.type == "cpu" else [])
                ready.pixels.append(cast(torch.Tensor, pixels).clone())
                pixel_bytes += sum(int(image.nbytes) for image in ready.decoded[-1])
    return ready


def _decode(chain: DecodingChain, plan: BatchPlan) -> list[torch.Tensor]:
    """What a CPU decodes of each image of a batch, from the image's corner (see pipeline/decoding/resize.py), one by one."""
    regions = replace(plan.regions, anchor=np.zeros_like(plan.regions.anchor), shape=plan.regions.reach)
    rows = iter([replace(plan, regions=regions).rows([row]) for row in range(len(plan.ids))])
    with closing(Graph(rows, replace(chain.graph.alone, resample=False, threads=1))) as graph:
        return [graph.collect()[0].clone() for _ in plan.ids]


def alone(loader: TrainLoader, closers: ExitStack, streamed: bool = False) -> list[Workload]:
    """Each stage by itself, in the order of a batch's way; what they hold is closed by `closers`.

    Tier resident has no reading and decoding once it is filled, which it must be. Where batches are cut out of RAM for a
    GPU, that is the copy. `streamed`: order and reading are left out, see `tools.profile.cutoff.read_alone`.
    """
    if "read" not in loader.chain.stages:
        return _resident(loader, closers)
    chain, machine, threads = cast(DecodingChain, loader.chain), loader.machine, loader.threads
    gpu = loader.device.type == "cuda"
    ready = make_ready(loader)
    plans, steps = ready.plans, range(len(ready.plans))
    mean_bytes = float(np.mean([view.nbytes for plan in plans for view in plan.encoded]))
    reading = max(1, machine.read_threads)
    works: list[Workload] = []
    if not streamed:
        works = [Workload("order", _endless(lambda step: len(chain.plan(step).ids), steps)),
                 Workload("read", pooled(_reading(loader, plans), steps, machine.read_threads, closers), reading, None, reading,
                          mean_bytes)]
    if machine.check_crc and bool(loader.index.header["crc32"]):
        works.append(Workload("crc", pooled(lambda step: _check(plans[step].encoded), steps, machine.read_threads, closers),
                              reading, None, reading, mean_bytes))
    graph = closers.enter_context(closing(Graph(itertools.cycle(plans), replace(chain.graph, decode_only=not gpu))))
    works.append(Workload("decode", _collected(graph.collect, loader.device), machine.prefetch + 1, None, threads, mean_bytes))
    if chain.graph.resample and not gpu:
        works.append(Workload("resize", _resized(loader, ready, closers), machine.prefetch + 1, None, threads))
    works.append(Workload("normalize", closers.enter_context(closing(_normalized(chain, ready))), 2, None, 1 if gpu else threads))
    if gpu:
        works.append(Workload("copy", _copied(loader, plans), 2, None, 1, mean_bytes))
    return [*works, _hand_over(loader, [(plan.step, plan.ids, plan.epochs) for plan in plans], closers)]


def _resident(loader: TrainLoader, closers: ExitStack) -> list[Workload]:
    chain, steps = cast(ResidentChain, loader.chain), range(min(len(loader), _MOST_BATCHES))
    normalizer = closers.enter_context(closing(chain.normalizer()))
    requests = [chain.requests.request(step) for step in steps]

    def normalized(step: int) -> int:
        request = requests[step]
        normalizer.begin(chain.store.crops(request.crops), request.augmentation)()
        arrived(loader.device)
        return len(request.ids)

    copies = loader.device.type == "cuda" and loader.machine.resident_memory == "ram"
    return [Workload("order", _endless(lambda step: len(chain.requests.request(step).ids), steps)),
            Workload("copy" if copies else "normalize", _endless(normalized, steps), 2, None, loader.threads),
            _hand_over(loader, [(step, requests[step].ids, requests[step].epochs) for step in steps], closers)]


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


def _reading(loader: TrainLoader, plans: list[BatchPlan]) -> Callable[[int], int]:
    source = ArchiveSource(loader.index, check_crc=False)

    def read(step: int) -> int:
        ids = plans[step].ids
        return sum(touch(pool.read(int(id))) for pool, id in zip(source.pools(ids, ids), ids))
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
    return closers.enter_context(closing(ahead_in_threads(work, itertools.cycle(steps), threads, "stage")))


def _resized(loader: TrainLoader, ready: Ready, closers: ExitStack) -> Iterator[int]:
    given = itertools.cycle([(images, plan.regions) for images, plan in zip(ready.decoded, ready.plans)])
    resizer = closers.enter_context(closing(Resizer(loader.data.crop_px, loader.threads)))
    return _collected(lambda: resizer(*next(given)), loader.device)


def _normalized(chain: DecodingChain, ready: Ready) -> Generator[int, None, None]:
    with closing(chain.normalizer()) as normalizer:
        for pixels, plan in itertools.cycle(list(zip(ready.pixels, ready.plans))):
            normalizer.begin(pixels.permute(0, 3, 1, 2), plan.augmentation)()
            arrived(chain.context.device)
            yield len(pixels)


def _copied(loader: TrainLoader, plans: list[BatchPlan]) -> Iterator[int]:
    """The bytes of a batch to the device, from pinned memory."""
    pinned = [torch.from_numpy(np.concatenate(plan.encoded)).pin_memory() for plan in plans]
    for bytes, plan in itertools.cycle(list(zip(pinned, plans))):
        bytes.to(loader.device, non_blocking=True)
        arrived(loader.device)
        yield len(plan.ids)


def _hand_over(loader: TrainLoader, taken: list[tuple[int, Ids, Ids]], closers: ExitStack) -> Workload:
    """Finished images through everything that is left: labels, `Batch`, the queue between threads."""
    size = loader.data.crop_px
    images = torch.zeros(len(taken[0][1]), 3, size, size, device=loader.device)

    def produce() -> Generator[Batch, None, None]:
        for step, ids, epochs in itertools.cycle(taken):
            yield loader.context.batch(step, ids, epochs, images)

    prefetcher = closers.enter_context(closing(Prefetcher(produce(), loader.chain.queue, loader.monitor)))
    return Workload("hand-over", (len(batch.ids) for batch in prefetcher), loader.machine.queue + 1)


def end_to_end(loader: TrainLoader, name: str = "loader") -> Workload:
    """The loader as anybody uses it, asked without pause."""
    return Workload(name, _batches(loader, lambda batch: None), prefetched(loader), loader.monitor, loader.threads)


def fed(loader: TrainLoader, consume: Callable[[Batch], None], name: str = "together") -> Workload:
    """The loader feeding `consume`, which returns when it is done with a batch."""
    return Workload(name, _batches(loader, consume), prefetched(loader), loader.monitor, loader.threads)


def prefetched(loader: TrainLoader) -> int:
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
    return float(loader.index.samples["size"][loader.context.ids].mean())
