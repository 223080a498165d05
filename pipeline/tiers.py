"""`make_train_loader` and `make_eval_loader`: the loaders of a data tier. All tiers give the same samples the same augmentation.

- ``archives``: region decode straight from the files as they were downloaded.
- ``packed``: the same from the 256-pixel JPEGs that tools/pack_shards.py wrote, in any order.
- ``streamed``: packed shards read only forwards, shuffled within a window; local or s3://.
- ``resident``: decoded squares in memory, filled from an index of either kind while the first epoch trains, or is evaluated.
"""
import difflib
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, get_type_hints

import torch
import torch.distributed as dist

from pipeline.compute_stats import find_or_compute
from pipeline.config import LANES, WINDOW, DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.index.subset import division_command, division_folder
from pipeline.loading.batch import LoaderContext
from pipeline.loading.loader import Chain, DecodingChain
from pipeline.loading.eval_loader import EvalLoader, Evaluation
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Monitor
from pipeline.progress import ProgressBar
from pipeline.reading.quarantine import Quarantine, StandIns, quarantine_budget
from pipeline.reading.shard_source import ShardSource
from pipeline.reading.source import ArchiveSource, Source
from pipeline.resident.chain import eval_chain, train_chain
from pipeline.schema import check_types
from pipeline.sampling.batch_plan import BlockPlanner, CropPlanner
from pipeline.sampling.sampler import Ids, Sampler, WindowSampler
from pipeline.stats import Stats, channel_mean, mean_image

TIERS = ("archives", "packed", "streamed", "resident")
P = ParamSpec("P")
R = TypeVar("R")
_ELSEWHERE = {"num_workers": "machine=LoaderConfig(threads=N)", "workers": "machine=LoaderConfig(threads=N)",
              "world_size": "shard=(rank, ranks)", "rank": "shard=(rank, ranks)", "transform": "data=DataConfig(…)",
              "shuffle": "make_train_loader, which shuffles, or make_eval_loader, which does not"}


def _names_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse by a TypeError an argument that a function does not have, with the one that was meant, or one of another type."""
    signature, hints = inspect.signature(function), get_type_hints(function)
    known = list(signature.parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        for name in given:
            if name not in known:
                near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, known, 1, 0.6)), None)
                raise TypeError(f"argument {name} of {function.__name__} is not known; "
                                + (f"use {near}" if near else f"it has {', '.join(known)}"))
        check_types(signature.bind(*args, **given).arguments, hints)
        return function(*args, **given)
    return checked


def check(tier: str, index: SampleIndex | None = None) -> None:
    """Raises ValueError when there is no such tier, or the index is not of the kind it reads."""
    if tier not in TIERS:
        raise ValueError(f"tier (={tier}) must be one of {', '.join(TIERS)}; correct it")
    if index is None:
        return
    if tier == "archives" and index.packed is not None:
        raise ValueError(f"tier (=archives) must name what the index is: {index.path} holds packed images; use tier packed (or "
                         "streamed, or resident)")
    if tier in ("packed", "streamed") and index.packed is None:
        raise ValueError(f"tier (={tier}) needs packed images, and {index.path} is an index of archives; run `alexnet "
                         f"pack {index.path} -o OUT` and give OUT as the index (in a recipe: as data.packed)")


def _shard(given: tuple[int, int] | None) -> tuple[int, int]:
    """The shard given, or that of this process in torch.distributed. Raises ValueError where a launcher has started several
    processes that torch.distributed does not know of: each would take all of the images."""
    if given is not None:
        if len(given) != 2 or not 0 <= given[0] < given[1]:
            raise ValueError(f"shard (={given}) must be (k, n) with 0 <= k < n; pass the rank and the number of ranks")
        return given
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"shard (=None) is not known: a launcher has started {processes} processes (WORLD_SIZE), but "
                         "torch.distributed is not initialized; call init_process_group before, or give shard=(rank, ranks)")
    return 0, 1


def _check_split(index: SampleIndex, split: str) -> None:
    """Raises ValueError when there is no such split, with where its images are, or how to hold some out."""
    if split != "val" or split in index.split_names or "train" not in index.split_names or index.packed is not None:
        index.split_rows(split)
        return
    divided = division_folder(index.path, index.sha256)
    remedy = f"use {divided}, which has" if (divided / "index.json").is_file() else \
        f"hold images out with `{division_command(index.path, divided)}`, and use {divided}"
    raise ValueError(f"split (=val) is not in the index {index.path}; it has {', '.join(index.split_names)}; {remedy}, for "
                     "training as well")


def _context(index: str | Path | SampleIndex, split: str, data: DataConfig | str, machine: LoaderConfig,
             device: torch.device | str | int | None, monitor: Monitor | None) -> LoaderContext:
    index = index if isinstance(index, SampleIndex) else SampleIndex.load(index)
    data = DataConfig.preset(data) if isinstance(data, str) else data
    try:
        where = torch.device("cpu" if device is None else device)
    except RuntimeError:  # no name of a device
        where = torch.device("meta")
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device (={device}) must be cpu or cuda; make the batches with device=\"cpu\" and move them")
    if where.type == "cuda" and not (0 if where.index is None else where.index) < torch.cuda.device_count():
        raise ValueError(f"device (={device}) is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
                         "GPUs; use device=\"cpu\", or a build of torch and a driver that go together")
    device_id = None if where.type == "cpu" else torch.cuda.current_device() if where.index is None else where.index
    return LoaderContext(index, split, data, machine, device_id, monitor or Monitor())


def _stats(context: LoaderContext, split: str) -> Stats:
    """The statistics of a split that the images of a loader depend on, computed when they are missing."""
    side = context.data.square_px
    if not context.data.needs_stats:
        return Stats.none(side)
    with ProgressBar() as progress:
        return find_or_compute(context.index, side, split, machine=context.machine, progress=progress)


@_names_arguments
def make_train_loader(index: str | Path | SampleIndex, split: str = "train", batch_size: int = 128, *,
                      data: DataConfig | str = DataConfig(), tier: str = "archives", seed: int = 0, stats: Stats | None = None,
                      shard: tuple[int, int] | None = None, device: torch.device | str | int | None = None,
                      return_batch: bool = False, machine: LoaderConfig = LoaderConfig(), resident: str = "rgb",
                      window: int = WINDOW, lanes: int = LANES, store: str = "", quarantine: Quarantine | None = None,
                      group: dist.ProcessGroup | None = None, monitor: Monitor | None = None) -> TrainLoader:
    """The training loader: shuffled, cropped, flipped images and their labels, without end.

        for images, labels in make_train_loader("index", data="imagenet"):    # one epoch; the next `for` gives the next one

    images: (B, 3, crop_px, crop_px), RGB, of the type `data.output`; labels: (B,) int64. `len(loader)` is the number of batches
    of the current epoch. Nothing is dropped or padded: what is left at the end of an epoch begins a batch that the next epoch
    fills, so every batch is full, and epochs may differ by one batch. `state_dict` and `load_state_dict` resume exactly, also
    within an epoch and on another number of processes.

    Args:
        index: folder that tools/build_index.py wrote, or a `SampleIndex` (loaded with the folder of archives that have moved).
        split: split to train on; all its samples must have labels.
        batch_size: global batch, over all ranks: each of n ranks gets batch_size / n images.
        data: crops, flips, colour jitter, normalization; or the name of a preset, alexnet or imagenet. By default the paper's.
        tier: archives, packed, streamed or resident; see `pipeline.tiers`.
        seed: of order and augmentation.
        stats: what the mean and the colour jitter come from. By default the statistics of this split that lie beside the index;
            missing ones are computed, with a progress bar, and stored (one process does it, while others wait). Where `data`
            needs none (three numbers as mean, no lighting), there are none.
        shard: (k, n), this process gets rows [k·B/n, (k+1)·B/n) of each batch. By default rank and world size of
            torch.distributed where it is initialized, else (0, 1).
        device: where images are decoded and the batches lie: "cpu" (None is the same), "cuda", "cuda:1" or a torch.device.
        return_batch: give `Batch` objects, with ids, epochs and paths, instead of (images, labels).
        machine: threads, queues and decoders; changes speed only.
        resident, group: tier resident, see `pipeline.resident.chain.train_chain`.
        window, lanes, store: tier streamed (the first two are part of the order), see `ShardSource`.
        quarantine: where unreadable samples are recorded, by default bounded by `machine.quarantine_budget`, without a file.
        monitor: counts waits; by default one of its own, `loader.monitor`.

    Raises TypeError for an unknown argument, or one of another type; ValueError when the index is not of the kind the tier reads,
    or split, batch_size, shard, device or statistics do not fit; RuntimeError when an archive is missing, too many samples are
    unreadable, or squares do not fit into memory.
    """
    context = _context(index, split, data, machine, device, monitor)
    index, data, shard = context.index, context.data, _shard(shard)
    check(tier, index)
    stats = (stats or _stats(context, split)).expect(data.square_px)
    subtracted = mean_image(data, stats)
    planner = CropPlanner(index, data, seed, channel_mean(data, stats), stats.eigenvalues, stats.eigenvectors)
    quarantine = quarantine or Quarantine(quarantine_budget(machine, len(context.ids)))
    remedy = "; or raise window (in a recipe: data.window)" if tier == "streamed" else ""
    stand_ins = StandIns(seed, quarantine, planner.plan, remedy)
    sampler: Sampler
    source: Source
    if tier == "streamed":
        sampler = windows = WindowSampler(index, context.ids, batch_size, seed, shard, window=window, lanes=lanes)
        source = ShardSource(index, windows, store=store, check_crc=machine.check_crc)
    else:
        sampler = Sampler(context.ids, batch_size, seed, shard)
        source = ArchiveSource(index, context.ids, check_crc=machine.check_crc)
    chain: Chain
    if tier == "resident":
        chain = train_chain(context, resident, sampler, planner, stand_ins, subtracted, group)
    else:
        chain = DecodingChain(context, BlockPlanner(sampler.take, sampler.share, planner), source, stand_ins,
                              context.decoding(context.ids, sampler.share, data.crop_px, boxed=data.resized_boxes), subtracted)
    return TrainLoader(context, chain, sampler, planner, quarantine, return_batch)


@_names_arguments
def make_eval_loader(index: str | Path | SampleIndex, split: str = "val", batch_size: int = 128, *,
                     data: DataConfig | str = DataConfig(), tier: str = "archives", stats: Stats | None = None,
                     stats_split: str = "train", shard: tuple[int, int] | None = None,
                     device: torch.device | str | int | None = None, return_batch: bool = False,
                     machine: LoaderConfig = LoaderConfig(), resident: str = "rgb", keep: bool = True,
                     skip_corrupt: bool = False, ids: Ids | None = None, monitor: Monitor | None = None) -> EvalLoader:
    """The evaluation loader: every image of a split exactly once, in id order; each `for` gives all of them again.

        for images, labels in make_eval_loader("index", "val", data="imagenet"):    # central crops

    images: (B, 3, crop_px, crop_px), the central crops; labels: (B,) int64, -1 where unknown. `len(loader)` is the number of
    this process's batches; the last one of a pass holds what is left. With `return_batch` a `Batch` holds whole central squares,
    (B, 3, square_px, square_px), of which `loader.crops(images, 1 or 10)` cuts the crops.

    Args:
        index, data, machine, monitor, device: see `make_train_loader`. All tiers but resident read the index, whatever its kind.
        batch_size: images of a batch; with several ranks each gets whole batches, every n-th.
        stats, stats_split: what is subtracted, by default the statistics of the training split, see `make_train_loader`.
        shard: (k, n), this process gets every n-th batch, beginning with the k-th. By default as in `make_train_loader`.
        resident, keep: tier resident, see `pipeline.resident.chain.eval_chain`.
        skip_corrupt: leave unreadable samples out, listed in `loader.skipped` (id → reason), instead of raising SampleError.
        ids: (N,) only these samples, in this order.

    Raises TypeError for an unknown argument, or one of another type; ValueError when there is no such tier, split or device, or
    batch_size, statistics or ids do not fit.
    """
    check(tier)
    index = index if isinstance(index, SampleIndex) else SampleIndex.load(index)
    _check_split(index, split)
    context, shard = _context(index, split, data, machine, device, monitor), _shard(shard)
    stats = stats or _stats(context, stats_split)
    evaluation = Evaluation(context, batch_size, stats, shard=shard, skip_corrupt=skip_corrupt, ids=ids)
    chain = eval_chain(evaluation, resident, keep) if tier == "resident" else evaluation.decoding_chain()
    return EvalLoader(evaluation, chain, return_batch)
