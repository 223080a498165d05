"""The contenders of `make bench`: our tiers, and what an expert writes with other people's libraries, doing the same work.

An engine (torch's DataLoader, webdataset, spdl's threads) runs a crop function (`tools.bench.crops`) in the workers and hands
over finished batches. Where workers are processes they send uint8, a quarter of the bytes of floats, and the consumer
normalizes, which makes them faster than sending floats (measured: docs/lab-log.md). What a batch and its parameters are:
`tools.bench.workload`.
"""
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch.utils.data import DataLoader, get_worker_info

from pipeline.config import LoaderConfig
from pipeline.loading.batch import Batch
from pipeline.sampling.augment import lighting_shift
from pipeline.tiers import make_train_loader
from tools.bench.crops import CROPS, Cropper, Normalize, decode
from tools.bench.workload import Augmented, Ids, Parameters, Photographs, Pixels, Running, Task, need


# --- ours

def ours(tier: str, task: Task) -> Running:
    """Our loader in a tier, settings at their defaults but for the number of threads."""
    original, packed = Photographs(task, "original"), Photographs(task, "packed")
    index, stats = packed.index if tier in ("packed", "streamed") else original.index, original.stats
    machine = LoaderConfig(threads=task.workers, quarantine_budget=0.05, resident_folder=str(task.scratch / "resident"))
    data = replace(task.data, region="square") if tier == "resident" else task.data
    loader = make_train_loader(index, batch_size=task.batch, data=data, tier=tier, stats=stats, machine=machine,
                               return_batch=True)
    loader.fill()

    def batches() -> Iterator[Batch]:
        while True:
            yield from loader

    def describe(batch: Batch) -> Augmented:
        drawn = loader.planner.augmentation(batch.ids, batch.epochs)
        others = (lighting_shift(drawn.alphas, stats.eigenvalues, stats.eigenvectors) if drawn.box is None else
                  np.column_stack([drawn.box, np.zeros(len(drawn.box))]))
        parameters = np.column_stack([drawn.top, drawn.left, drawn.mirror, others]).astype(np.float32)
        return Augmented(batch.images, batch.ids, parameters)

    return Running(batches(), describe, loader.close)


# --- engines

def one_thread(worker: int = 0) -> None:
    """Let torch's own threads be: there are as many workers as cores are meant to be used."""
    torch.set_num_threads(1)


def unchanged(batch: Any) -> Any:
    """A collate function, and a description, that leaves a batch alone."""
    return batch


class CropDataset:
    """For torch's DataLoader: ids and parameters → a batch of crops (B, crop, crop, 3) uint8 with them."""

    def __init__(self, cropper: Cropper) -> None:
        self.cropper = cropper

    def __getitems__(self, drawn: tuple[Ids, Parameters]) -> tuple[Any, ...]:
        ids, parameters = drawn
        crops = [self.cropper(id, numbers) for id, numbers in zip(ids.tolist(), parameters.tolist())]
        return torch.from_numpy(np.stack(crops)), ids, parameters


def dataloader(kind: str, crop: str | None, task: Task) -> Running:
    """torch's DataLoader with worker processes, which send uint8 batches."""
    cropper = Cropper(Photographs(task, kind), crop)
    cropper(int(cropper.photographs.ids[0]), [0.0] * 6)  # a missing package is named here, not by a worker process
    sampler: Any = cropper.photographs.batches()
    loader: Any = DataLoader(CropDataset(cropper), batch_sampler=sampler, num_workers=task.workers,  # type: ignore[arg-type]
                             collate_fn=unchanged, worker_init_fn=one_thread, multiprocessing_context="spawn")
    return Running(itertools.starmap(Normalize(cropper.photographs).batch, loader), unchanged)


class ShardCrop:
    """For webdataset: a sample of a shard → (crop, id, parameters). The id of the first batch's only, for the check."""

    def __init__(self, photographs: Photographs, crop: str) -> None:
        self.photographs, self.crop, self.count = photographs, CROPS[photographs.task.work][crop], 0
        self._random: np.random.Generator | None = None

    def __call__(self, sample: dict[str, Any]) -> tuple[Pixels, int, Parameters]:
        if self._random is None:  # in a worker process: a generator of its own
            info = get_worker_info()
            self._random = np.random.default_rng(info.seed if info else 0)
        parameters = self.photographs.draw(self._random, 1)[0]
        self.count += 1
        id = self.photographs.id_of(sample["jpg"]) if self.count <= self.photographs.task.batch else -1
        return self.crop(sample["jpg"], parameters.tolist()), id, parameters


def stacked(samples: Sequence[tuple[Pixels, int, Parameters]]) -> tuple[Any, ...]:
    """Samples to a batch; the crops as a torch tensor, which crosses the processes in shared memory."""
    crops, ids, parameters = zip(*samples)
    return torch.from_numpy(np.stack(crops)), np.array(ids), np.stack(parameters)


def webdataset(kind: str, crop: str, task: Task) -> Running:
    """webdataset with worker processes, shards drawn again and again, a shuffle buffer."""
    wds, photographs = need("webdataset"), Photographs(task, kind)
    dataset = wds.WebDataset(photographs.shards(), resampled=True, shardshuffle=False, nodesplitter=None).shuffle(200)
    dataset = dataset.map(ShardCrop(photographs, crop)).batched(task.batch, collation_fn=stacked, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=task.workers, worker_init_fn=one_thread,
                           multiprocessing_context="spawn")
    return Running(itertools.starmap(Normalize(photographs).batch, loader), unchanged)


def spdl(kind: str, crop: str | None, task: Task) -> Running:
    """spdl's pipeline: threads of one process, each making whole batches, so that nothing crosses processes."""
    builder = need("spdl.pipeline").PipelineBuilder()
    one_thread()
    cropper = Cropper(Photographs(task, kind), crop)
    normalize = Normalize(cropper.photographs, lasting=2 * task.workers + 4)  # in work, in spdl's queues, and with the consumer

    def make(drawn: tuple[Ids, Parameters]) -> Augmented:
        ids, parameters = drawn
        crops = (cropper(id, numbers) for id, numbers in zip(ids.tolist(), parameters.tolist()))
        return normalize.batch(crops, ids, parameters)

    source = builder.add_source(cropper.photographs.batches())
    pipeline = source.pipe(make, concurrency=task.workers).add_sink(2).build(num_threads=task.workers)
    pipeline.start()
    return Running(iter(pipeline), unchanged, pipeline.stop)


def whole_decode(kind: str, task: Task) -> Running:
    """The limit: nothing but libjpeg-turbo's decode of whole files, into memory that is used again, in threads."""
    photographs, executor = Photographs(task, kind), ThreadPoolExecutor(task.workers)
    rows = photographs.index.samples[photographs.ids]
    largest = int((rows["height"].astype(np.int64) * rows["width"]).max()) * 3
    buffers = [np.empty(largest, np.uint8) for _ in range(task.workers + 3)]

    def make(ids: list[int], buffer: npt.NDArray[np.uint8]) -> None:
        for id in ids:
            try:
                simplejpeg.decode_jpeg(photographs.read(id), "RGB", fastdct=False, fastupsample=False, buffer=buffer)
            except ValueError:  # one in thousands is CMYK or a PNG
                decode(photographs.read(id))

    def batches() -> Iterator[None]:
        under_way: deque[Future[None]] = deque()
        for (ids, _), buffer in zip(photographs.batches(), itertools.cycle(buffers)):
            under_way.append(executor.submit(make, ids.tolist(), buffer))
            if len(under_way) == len(buffers) - 1:
                yield under_way.popleft().result()

    return Running(batches(), None, executor.shutdown)


# --- all of them

@dataclass(frozen=True)
class Contender:
    """One contender."""
    name: str  # for --only and the JSON
    label: str  # for people
    data: str  # what it reads: a key of KINDS
    role: str  # ours, peer or limit
    start: Callable[[Task], Running]  # raises NotAvailable


KINDS = {"original": "the original files", "packed": "files of 256 px", "decoded": "resized images"}
_DECODE = "libjpeg-turbo, whole decode and nothing else"
CONTENDERS = {contender.name: contender for contender in (
    Contender("archives", "ours, tier archives", "original", "ours", partial(ours, "archives")),
    Contender("pil", "DataLoader + PIL", "original", "peer", partial(dataloader, "original", "pil")),
    Contender("torch", "DataLoader + simplejpeg, torch's resize", "original", "peer",
              partial(dataloader, "original", "torch")),
    Contender("webdataset", "webdataset + simplejpeg, torch's resize", "original", "peer",
              partial(webdataset, "original", "torch")),
    Contender("spdl_torch", "spdl + simplejpeg, torch's resize", "original", "peer", partial(spdl, "original", "torch")),
    Contender("decode", _DECODE, "original", "limit", partial(whole_decode, "original")),
    Contender("packed", "ours, tier packed", "packed", "ours", partial(ours, "packed")),
    Contender("streamed", "ours, tier streamed", "packed", "ours", partial(ours, "streamed")),
    Contender("packed_dataloader", "DataLoader + simplejpeg", "packed", "peer", partial(dataloader, "packed", "torch")),
    Contender("packed_webdataset", "webdataset + simplejpeg", "packed", "peer", partial(webdataset, "packed", "torch")),
    Contender("packed_spdl_simplejpeg", "spdl + simplejpeg", "packed", "peer", partial(spdl, "packed", "torch")),
    Contender("packed_decode", _DECODE, "packed", "limit", partial(whole_decode, "packed")),
    Contender("resident", "ours, tier resident", "decoded", "ours", partial(ours, "resident")),
    Contender("memmap", "memory map + DataLoader, uint8 batches", "decoded", "peer", partial(dataloader, "original", None)),
    Contender("memmap_spdl", "memory map + spdl's threads", "decoded", "peer", partial(spdl, "original", None)),
)}
