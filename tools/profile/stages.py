"""The stages of a loader as workloads: each alone, the loader cut off after each, and the loader end to end.

A stage alone gets its inputs ready-made and its outputs are thrown away; so its rate is what it could do if everything else were
free, and the CPU times of all stages add up to the loader's. The code that runs is the loader's own, through its `Chain`:

    read        order, crops and regions, and the bytes of every page       crc         check them
    decode      DALI, of the region (on a GPU all until images are ready)   normalize   on a CPU: the resize and `Normalizer`
    copy        to a GPU                                                    hand-over   labels, `Batch`, the queue between threads
"""
import gc
import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from pipeline.config import LoaderConfig
from pipeline.decoding.dali import RegionPipeline
from pipeline.decoding.decoder import Decoder, Pixels
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.loader import DecodingChain
from pipeline.loading.prefetch import ahead_in_threads
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.resident.chain import ResidentChain
from pipeline.sampling.batch_plan import BatchPlan
from tools.profile.measure import Figures, Workload, run_turn, summarize

_MOST_IMAGES = 1024  # of ready-made inputs: half a gigabyte of photographs, encoded and decoded
_PROBES = 16  # offsets of each file that are looked at
_CACHED = 0.05  # share of them that may still be cached where the files count as dropped


def workloads(loader: TrainLoader, make: Callable[[LoaderConfig], TrainLoader],
              closers: ExitStack) -> tuple[list[Workload], list[Workload]]:
    """Each stage alone, in the order of a batch's way; and the loader cut off after each that its chain can end after, named
    "up to …". Reading alone is the loader cut off after it, without checks. `make` opens another loader of the same images;
    `closers` closes all that the workloads hold.

    Tier resident, which must be filled, reads and decodes nothing, and its stages follow one another in one thread: nothing is
    cut off. Where batches are cut out of RAM for a GPU, normalizing is called the copy, which it mostly is.
    """
    machine = loader.machine
    if "read" not in loader.chain.stages:
        return [_resident(loader, closers), _hand_over(loader, closers)], []
    checks = machine.check_crc and bool(loader.index.header["crc32"])
    alone = [_until("read", "read", make(replace(machine, check_crc=False)), closers), *_alone(loader, checks, closers),
             _hand_over(loader, closers)]
    ends = [("read", "crc")] * checks + [(stage, stage) for stage in loader.chain.stages[1:]]
    return alone, [_until(stage, f"up to {name}", make(machine), closers) for stage, name in ends]


def _until(stage: str, name: str, loader: TrainLoader, closers: ExitStack) -> Workload:
    """A loader that ends after this stage of its chain."""
    machine = closers.enter_context(loader).machine
    outputs = closers.enter_context(closing(loader.chain.until(stage, range(sys.maxsize))))

    def images(output: Any) -> int:
        return arrived(loader, len((output[0] if isinstance(output, tuple) else output).ids))

    reads = stage == "read"
    return Workload(name, map(images, outputs), machine.prefetch + machine.read_threads + 3, None,
                    max(1, machine.read_threads) if reads else loader.threads, image_bytes(loader) if reads else 0.0)


def _alone(loader: TrainLoader, checks: bool, closers: ExitStack) -> Iterator[Workload]:
    chain, machine, gpu = cast(DecodingChain, loader.chain), loader.machine, loader.device.type == "cuda"
    inputs, size = ready(loader), image_bytes(loader)
    plans = [plan for plan, _ in inputs]
    if checks:
        checked = ahead_in_threads(_check, itertools.cycle(plans), machine.read_threads, "stage")
        threads = max(1, machine.read_threads)
        yield Workload("crc", closers.enter_context(closing(checked)), threads, None, threads, size)
    pipeline = closers.enter_context(closing(RegionPipeline(itertools.cycle(plans), chain.settings)))
    collect = pipeline.collect if gpu else pipeline.rows  # rows are resized by whoever normalizes them
    decoded = (len(collect()) for _ in itertools.count())
    yield Workload("decode", map(partial(arrived, loader), decoded), machine.prefetch + 1, None, loader.threads, size)
    if not gpu:
        normalizer = closers.enter_context(closing(chain.normalizer()))
        normalized = (len(normalizer.begin(pixels, plan.augmentation)()) for plan, pixels in itertools.cycle(inputs))
        yield Workload("normalize", normalized, 2, None, loader.threads)
    else:
        joined = ((np.frombuffer(bytearray().join(plan.encoded), np.uint8), len(plan.ids)) for plan in plans)
        pinned = [(torch.from_numpy(encoded).pin_memory(), count) for encoded, count in joined]
        copied = ((encoded.to(loader.device, non_blocking=True), count) for encoded, count in itertools.cycle(pinned))
        yield Workload("copy", (arrived(loader, count) for _, count in copied), 2, None, 1, size)


def ready(loader: TrainLoader) -> list[tuple[BatchPlan, Pixels]]:
    """Some batches of the loader, their bytes in memory of our own, and what is decoded of them. Samples that cannot be decoded
    are replaced, as in training."""
    chain, steps = cast(DecodingChain, loader.chain), range(_steps(loader))
    with closing(chain.read(steps)) as plans:
        copies = (replace(plan, encoded=[memoryview(bytes(view)) for view in plan.encoded]) for plan in plans)
        with closing(Decoder(copies, chain.settings, chain.recover, Monitor())) as decoder:
            return list(decoder)


def _steps(loader: TrainLoader) -> int:
    """Batches that a stage alone works on, again and again."""
    return max(1, min(len(loader), _MOST_IMAGES // loader.sampler.share))


def _check(plan: BatchPlan) -> int:
    for view in plan.encoded:
        crc32(view)
    return len(plan.ids)


def _resident(loader: TrainLoader, closers: ExitStack) -> Workload:
    chain = cast(ResidentChain, loader.chain)
    normalizer = closers.enter_context(closing(chain.normalizer()))

    def images(step: int) -> int:
        request = chain.request(step)
        return arrived(loader, len(chain.images(normalizer, request)()))

    copies = loader.device.type == "cuda" and loader.machine.resident_memory == "ram"
    steps = itertools.cycle(range(_steps(loader)))
    return Workload("copy" if copies else "normalize", map(images, steps), 2, None, loader.threads)


def _hand_over(loader: TrainLoader, closers: ExitStack) -> Workload:
    """Finished images through everything that is left: labels, `Batch`, the queue between threads."""
    taken = [(step, *loader.sampler.take(step)) for step in range(_steps(loader))]
    images = torch.zeros(loader.sampler.share, 3, loader.data.crop_px, loader.data.crop_px, device=loader.device)

    def produce() -> Generator[Batch, None, None]:
        for step, ids, epochs in itertools.cycle(taken):
            yield loader.context.batch(step, ids, epochs, images)

    prefetcher = closers.enter_context(closing(loader.ahead(produce())))
    batches = (loader.take(prefetcher, step) for step in itertools.count())
    return Workload("hand-over", (len(batch.ids) for batch in batches), loader.machine.queue + 1)


def end_to_end(loader: TrainLoader, consume: Callable[[Batch], None] | None = None, name: str = "loader") -> Workload:
    """The loader as anybody uses it, asked without pause; or feeding `consume`, which returns when it is done with a batch."""
    def batches() -> Iterator[int]:
        while True:
            for batch in loader:
                if consume is not None:
                    consume(batch)
                count = len(batch.ids)
                del batch
                yield arrived(loader, count)

    machine = loader.machine
    return Workload(name, batches(), machine.queue + machine.prefetch + machine.read_threads + 2, loader.monitor, loader.threads)


def arrived(loader: TrainLoader, count: int) -> int:
    """`count`, once what this thread was given is there: on a GPU it may still be under way; what is prefetched continues."""
    if loader.device.type == "cuda":
        torch.cuda.current_stream(loader.device).synchronize()
    return count


def image_bytes(loader: TrainLoader) -> float:
    """Mean bytes of a file of the split."""
    return float(loader.index.samples["size"][loader.context.ids].mean())


# --- files that are not in the page cache

def drop(index: SampleIndex, split: str) -> float:
    """Ask the kernel to drop the archives of a split from the page cache; returns the share of some probes that is still cached.
    Close loaders before. It is a wish: tmpfs and pages that are mapped elsewhere stay in memory, and a file system that does not
    know `RWF_NOWAIT` counts as one that keeps all."""
    cached = []
    for archive in np.unique(index.samples["archive"][index.ids(split)]).tolist():
        path = index.archive_path(archive)
        for file in filter(Path.is_file, sorted(path.rglob("*")) if path.is_dir() else [path]):
            with file.open("rb") as opened:
                descriptor, size = opened.fileno(), file.stat().st_size
                os.fsync(descriptor)  # pages not yet written cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                for probe in range(_PROBES):
                    try:
                        cached.append(os.preadv(descriptor, [bytearray(1)], size * probe // _PROBES, os.RWF_NOWAIT) > 0)
                    except OSError as error:
                        cached.append(not isinstance(error, BlockingIOError))
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what looking may have fetched
    return float(np.mean(cached))


def measure_cold(make: Callable[[], TrainLoader], index: SampleIndex, split: str, seconds: float,
                 rounds: int) -> tuple[Figures, str]:
    """Figures of a fresh loader on dropped files, over at most an epoch; and a note on the dropping. The start-up (threads,
    DALI's first batches) is included: with a small set it weighs more than the disk."""
    turns, kept = [], 0.0
    for _ in range(rounds):
        gc.collect()  # a closed loader has its archives mapped for as long as anything refers to it
        kept = drop(index, split)
        with make() as loader:
            turns.append(run_turn(Workload("cold", (len(batch.ids) for batch in loader), 0, loader.monitor), seconds))
    note = f"{kept:.0%} of the archives stayed in memory: this is no cold figure; " if kept > _CACHED else ""
    return summarize(Workload("cold", iter(())), turns), f"{note}start-up included, at most an epoch"
