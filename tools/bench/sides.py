"""The list of sides that `tools/bench/__main__.py` times, and how each is started; ours among them.

The one concept: a side is a name, what it reads (`original` files, `packed` 256-px files, `decoded` squares), whose it is,
how far its pixels may lie from the exact ones, and a function that starts it in a process of its own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.bench import contenders as bench_peers
from tools.bench.workload import Material, Running, Told, Work, data_config

if TYPE_CHECKING:
    from pipeline.loading.batch import Batch

DATA = {"original": "the original files", "packed": "files of 256 px", "decoded": "decoded squares"}


def ours(work: Work, tier: str) -> Running:
    """Our loader in tier `tier`, settings at their defaults but for the number of threads."""
    from pipeline.config import LoaderConfig
    from pipeline.sampling.augment import lighting_shift
    from pipeline.tiers import train_loader
    original, packed = Material(work, "original"), Material(work, "packed")
    index = packed.index if tier in ("packed", "streamed") else original.index
    settings: dict[str, Any] = {"threads": work.workers, "quarantine_budget": 0.05}
    if tier == "resident":
        settings["resident_folder"] = str(work.scratch / "resident")
    stats = original.stats
    loader = train_loader(tier, index, work.split, data_config(), work.batch, 0, stats, machine=LoaderConfig(**settings))

    def batches() -> Iterator[Batch]:
        while True:
            yield from loader

    def told(batch: Batch) -> Told:
        drawn = loader.draws(batch.ids, batch.epochs)
        shift = lighting_shift(drawn.alphas, stats.eigenvalues, stats.eigenvectors)
        draws = np.column_stack([drawn.top, drawn.left, drawn.mirror, shift]).astype(np.float32)
        return Told(batch.images, batch.ids, draws)

    endless = batches()
    if tier == "resident":      # it fills while the first epoch trains: that is not what is timed
        for _ in range(-(-len(original.ids) // work.batch) + 1):
            next(endless)
    return Running(endless, told, loader.close)


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        name: short, for --only and the JSON.
        label: for people.
        data: a key of DATA: what it reads.
        role: `ours`, `peer` or `limit`.
        start: Work → Running; raises NotAvailable.
        tolerance: largest mean difference, in grey levels, of its first batch from the exact pixels. A wrong offset,
            reflection or mean is tens of levels.
    """
    name: str
    label: str
    data: str
    role: str
    start: Callable[[Work], Running]
    tolerance: float = 1.0


def _cutter(work: Work, data: str, cut: bench_peers.Cut | None) -> bench_peers.Cutter:
    return bench_peers.Cutter(Material(work, data), cut)


_torch, _opencv, _pil, _spdl = bench_peers.cut_torch, bench_peers.cut_opencv, bench_peers.cut_pil, bench_peers.cut_spdl
SIDES = (
    Side("archives", "ours, tier archives", "original", "ours", lambda work: ours(work, "archives")),
    Side("pil", "DataLoader + PIL", "original", "peer", lambda work: bench_peers.dataloader(_cutter(work, "original", _pil))),
    Side("opencv", "DataLoader + simplejpeg, OpenCV", "original", "peer",
         lambda work: bench_peers.dataloader(_cutter(work, "original", _opencv)), 3.0),
    Side("torch", "DataLoader + simplejpeg, torch's resize", "original", "peer",
         lambda work: bench_peers.dataloader(_cutter(work, "original", _torch))),
    Side("webdataset", "webdataset + simplejpeg, torch's resize", "original", "peer",
         lambda work: bench_peers.webdataset(Material(work, "original"), _torch)),
    Side("spdl", "spdl, its own decoder", "original", "peer",
         lambda work: bench_peers.spdl(_cutter(work, "original", _spdl)), 3.0),
    Side("spdl_torch", "spdl + simplejpeg, torch's resize", "original", "peer",
         lambda work: bench_peers.spdl(_cutter(work, "original", _torch))),
    Side("decode", "libjpeg-turbo, whole decode and nothing else", "original", "limit",
         lambda work: bench_peers.whole_decode(Material(work, "original"))),
    Side("packed", "ours, tier packed", "packed", "ours", lambda work: ours(work, "packed")),
    Side("streamed", "ours, tier streamed", "packed", "ours", lambda work: ours(work, "streamed")),
    Side("packed_dataloader", "DataLoader + simplejpeg", "packed", "peer",
         lambda work: bench_peers.dataloader(_cutter(work, "packed", _torch))),
    Side("packed_webdataset", "webdataset + simplejpeg", "packed", "peer",
         lambda work: bench_peers.webdataset(Material(work, "packed"), _torch)),
    Side("packed_spdl", "spdl, its own decoder", "packed", "peer",
         lambda work: bench_peers.spdl(_cutter(work, "packed", _spdl)), 3.0),
    Side("packed_spdl_simplejpeg", "spdl + simplejpeg", "packed", "peer",
         lambda work: bench_peers.spdl(_cutter(work, "packed", _torch))),
    Side("packed_decode", "libjpeg-turbo, whole decode and nothing else", "packed", "limit",
         lambda work: bench_peers.whole_decode(Material(work, "packed"))),
    Side("resident", "ours, tier resident", "decoded", "ours", lambda work: ours(work, "resident")),
    Side("memmap_items", "memory map + DataLoader, float images", "decoded", "peer",
         lambda work: bench_peers.dataloader(_cutter(work, "original", None), items=True)),
    Side("memmap", "memory map + DataLoader, uint8 batches", "decoded", "peer",
         lambda work: bench_peers.dataloader(_cutter(work, "original", None))),
    Side("memmap_spdl", "memory map + spdl's threads", "decoded", "peer",
         lambda work: bench_peers.spdl(_cutter(work, "original", None))),
)
BY_NAME = {side.name: side for side in SIDES}
