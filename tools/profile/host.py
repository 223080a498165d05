"""Host ceiling: images/s that the interpreter's lock allows when pixels cost nothing.

Measured: the loader as it is, plans, reading, checks, feeding DALI, `Batch`, queue and threads, but for a DALI pipeline that
takes all inputs and decodes nothing. From its CPU time goes that of copying and checksumming the bytes, during which other
threads have the lock, and that of DALI's own threads, which need none; what is left is counted as if it all needed the lock. In
tier resident, which reads and decodes nothing: the loader as it is, but for crops of a single pixel.
"""
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.loading.loader import DecodingChain
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import usage
from tools.profile.measure import Figures

_IMAGES, _TIMES = 256, 9  # samples whose bytes are read to see what that takes, and how often


@dataclass(frozen=True)
class Host:
    """CPU µs an image of everything but pixels."""
    cpu_us: float  # in all
    bytes_us: float  # of that, copying and checksumming bytes
    dali_us: float  # and in DALI's own threads

    @property
    def lock_us(self) -> float:
        return max(0.01, self.cpu_us - self.bytes_us - self.dali_us)

    @property
    def ceiling(self) -> float:
        """Images/s."""
        return 1e6 / self.lock_us


def without_pixels(loader: TrainLoader, closers: ExitStack) -> TrainLoader:
    """`loader`, a fresh one that `closers` closes, with a decoder that decodes nothing."""
    chain = cast(DecodingChain, closers.enter_context(loader).chain)
    bare = DecodingChain(loader.context, chain.plan, chain.source, chain.policy, replace(chain.settings, inputs_only=True),
                         raw=True)
    return TrainLoader(loader.context, bare, loader.sampler, loader.planner, loader.quarantine)


def host(figures: Figures, loader: TrainLoader) -> Host:
    """`figures` of `loader`, which costs no pixels, from end to end. The bytes' part is the difference between reading and
    checking samples whole, and the first byte of each, in the same calls."""
    if not isinstance(loader.chain, DecodingChain):
        return Host(figures.cpu * 1e3, 0.0, 0.0)
    dali_us = usage(loader.monitor).decode / max(1, loader.step * loader.sampler.share) * 1e6
    index, ids = loader.index, loader.context.ids
    rows = index.samples[ids[np.linspace(0, len(ids) - 1, _IMAGES).astype(np.int64)]]
    rows = rows[[not index.archives[position].is_folder for position in rows["archive"]]]
    checks = loader.machine.check_crc and bool(index.header["crc32"])
    if not len(rows):
        return Host(figures.cpu * 1e3, 0.0, dali_us)
    files = {position: os.open(index.archive_path(position), os.O_RDONLY) for position in np.unique(rows["archive"]).tolist()}
    stops = np.cumsum(rows["size"], dtype=np.int64).tolist()
    block = memoryview(bytearray(stops[-1]))
    wholes = [block[low:high] for low, high in zip([0, *stops], stops)]

    def seconds(views: list[memoryview]) -> float:
        places = list(zip(rows["archive"].tolist(), rows["offset"].tolist(), views))
        start = time.thread_time()
        for position, offset, view in places:
            os.preadv(files[position], [view], offset)
            if checks:
                crc32(view)
        return time.thread_time() - start

    try:
        seconds(wholes)  # into the page cache
        whole, first = ([seconds(views) for _ in range(_TIMES)] for views in (wholes, [view[:1] for view in wholes]))
    finally:
        for file in files.values():
            os.close(file)
    return Host(figures.cpu * 1e3, (statistics.median(whole) - statistics.median(first)) / len(rows) * 1e6, dali_us)
