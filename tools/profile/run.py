"""Runs a profile: from arguments to a subject (index, data, settings, tier), from a subject to all its figures.

First the loader alone in a fresh process, for its memory and its trace; then everything interleaved; then what cannot be: cold
files, the sweep, other people's loaders.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.config import DataConfig, LoaderConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Event, Monitor
from pipeline.parallel import cores
from pipeline.resident.capacity import memory
from pipeline.stats import Stats, stats_path
from pipeline.tiers import check as check_tier, train_loader
from tools.profile import stages
from tools.profile.cold import measure_cold
from tools.profile.measure import Figures, Workload, machine_cpu_s, measure, rss_mb
from tools.profile.network import NetworkStep
from tools.profile.report import Profile
from tools.profile.sweep import axes, sweep
from tools.profile.verdict import Measured, Setup, verdict
from train.build import loader_config
from train.config import Config
from train.parallel.topology import Topology, process_group
from train.recipe import load

PAPER = DataConfig(region="square", square_px=256, crop_px=227, mirror=True, lighting=0.1, mean="image")    # §2, §4.1
PAPER_BATCH = 128   # §5
_LENIENT = 0.05     # share of unreadable samples a profile passes over: it trains nothing
_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numpy")


@dataclass(frozen=True)
class Subject:
    """What is profiled: a loader's arguments, its tier and what only that tier takes, its device and recipe."""
    index: SampleIndex
    split: str
    data: DataConfig
    batch: int
    seed: int
    stats: Stats
    machine: LoaderConfig
    tier: str
    tier_options: dict[str, Any]
    device: torch.device
    config: Config | None

    @property
    def title(self) -> str:
        """In words."""
        return (f"{self.index.path}, {len(self.index.ids(self.split)):,} images of split {self.split}, tier {self.tier}, "
                f"{self.data.crop_px} of {self.data.square_px} px, batch {self.batch}, on {self.device}, "
                f"{self.machine.threads} of {cores()} cores for pixels")

    def loader(self, machine: LoaderConfig | None = None, batch: int | None = None,
               monitor: Monitor | None = None) -> TrainLoader:
        """A loader of it, with other settings where given."""
        return train_loader(self.tier, self.index, self.split, self.data, batch or self.batch, self.seed, self.stats,
                            machine=machine or self.machine, device_id=self.device.index, monitor=monitor, **self.tier_options)

    def setup(self, others: float) -> Setup:
        """Where and on what it is measured; `others`: share of the cores that other programs used meanwhile."""
        gpu = self.device.type == "cuda"
        rows = self.index.samples[self.index.ids(self.split)]
        return Setup(self.tier, self.machine, cores(), gpu, len(rows), self.data.square_px, float(rows["size"].mean()),
                     self.data.region == "square", memory()[0], torch.cuda.mem_get_info(self.device)[0] if gpu else 0,
                     _spinning(self.index.archive_path(int(rows["archive"][0]))), others)


def subject(args: argparse.Namespace, topology: Topology, config: Config | None) -> Subject:
    """What the arguments name. Raises ValueError when the index, its statistics or the tier's data are not there."""
    tier = args.tier or (config.data.tier if config else "archives")
    path = args.index or (config.data.index if config else None)
    if tier in ("packed", "streamed"):
        path = args.packed or args.index or (config.data.packed if config else "") or path  # the index may be the packed folder
    assert path is not None     # checked: --config or --index
    archives = str(args.archives or (config.machine.archives if config else ""))
    store = archives if archives.startswith("s3://") else ""
    index = SampleIndex.load(path, None if store else archives or None)
    check_tier(tier, index)
    split = config.data.train_split if config else "train"
    if not store:
        index.check_archives(split)
    data = config.data.pixels() if config else PAPER
    machine = loader_config(config, topology) if config else LoaderConfig(threads=cores())
    given = {name: getattr(args, name) for name in ("threads", "read_threads", "prefetch", "queue")}
    machine = replace(machine, quarantine_budget=max(_LENIENT, machine.quarantine_budget),
                      **{name: value for name, value in given.items() if value is not None})
    machine = replace(machine, threads=machine.threads or cores())
    batch = args.batch or (config.train.batch if config else PAPER_BATCH)
    options = {"resident": args.resident or (config.data.resident if config else "rgb"), "store": store,
               **({"window": config.data.window, "lanes": config.data.lanes} if config else {})}
    return Subject(index, split, data, min(batch, len(index.ids(split))), config.train.seed if config else 0,
                   Stats.for_index(index, data.square_px, split), machine, tier, options, topology.device, config)


def _spinning(archive: Path) -> bool:
    """Whether the archive's disk says that it turns (virtual disks may say so without cause)."""
    device = os.stat(archive).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for disk in (folder, folder.parent):   # a partition's queue is its disk's
        with contextlib.suppress(OSError):
            return (disk / "queue" / "rotational").read_text(encoding="ascii").strip() == "1"
    return False


@dataclass(frozen=True)
class _Warm:
    """What was measured with files in the page cache: figures, the loader cut off after each stage, events and queue depths of
    the first turn, and the share of the machine's cores that other programs used."""
    measured: Measured
    cumulative: tuple[Figures, ...]
    events: tuple[Event, ...]
    depths: tuple[tuple[float, int], ...]
    others: float


def profile(args: argparse.Namespace) -> tuple[Profile, Sequence[Event], Sequence[tuple[float, int]]]:
    """The profile that the (checked) arguments ask for, and the events and queue depths of its first turn for a trace."""
    config = load(args.config) if args.config else None
    device = args.device or (config.machine.device if config else "auto")
    with process_group(towers=config.model.towers if config else 1, device=device, timeout_s=86400) as ranks:
        what = subject(args, ranks, config)
        if args.compare:
            _check_comparable(what.data)
        warm = _warm(args, what, ranks)
        # From here on threads are idle, and no loader has the archives mapped.
        cold, note = None, ""
        if args.cold:
            cold, note = measure_cold(what.loader, what.index, what.split, args.seconds, min(3, args.repeats))
        along = axes(what.machine, what.batch, cores(), what.device.type == "cuda", len(what.index.ids(what.split)))
        points = sweep(what.loader, what.machine, what.batch, along, args.seconds, 2) if args.sweep else []
        others, absent = compared(what, args.seconds, args.repeats) if args.compare else ({}, ())
    measured, setup = warm.measured, what.setup(warm.others)
    need_from = "" if measured.need is None else "the network's own step, measured" if args.model else "as stated"
    versions = {name: metadata.version(name) for name in _PACKAGES if any(metadata.distributions(name=name))}
    return Profile(what.title, what.batch, measured, setup, verdict(measured, setup), warm.cumulative, cold, note, need_from,
                   points, others, absent, {**versions, "python": platform.python_version()}), warm.events, warm.depths


def _warm(args: argparse.Namespace, what: Subject, ranks: Topology) -> _Warm:
    monitor = Monitor(trace=args.trace is not None, nvtx=args.nvtx)
    before, start, cpu = rss_mb(), time.perf_counter(), machine_cpu_s() - time.process_time()
    with ExitStack() as closers:
        loader = closers.enter_context(what.loader(monitor=monitor))
        loader.fill()
        first = measure([stages.end_to_end(loader)], max(args.seconds, 1.0), 1)["loader"]
        events, depths = tuple(monitor.events), tuple(monitor.depths)
        measured, cumulative = _interleaved(args, what, ranks, loader, closers)
    measured = replace(measured, loader=replace(measured.loader, rss_mb=(before, *first.rss_mb[1:])))
    seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return _Warm(measured, cumulative, events, depths, max(0.0, (machine_cpu_s() - time.process_time() - cpu) / seconds))


def _interleaved(args: argparse.Namespace, what: Subject, ranks: Topology, loader: TrainLoader,
                 closers: ExitStack) -> tuple[Measured, tuple[Figures, ...]]:
    """Stages, loader and consumer, and the loader cut off after each stage."""
    alone, cut = stages.workloads(loader, what.loader, closers)
    workloads = [*alone, *cut, stages.end_to_end(loader)]
    if args.model:
        assert what.config is not None
        network = NetworkStep(replace(what.config, train=replace(what.config.train, batch=what.batch)), ranks)
        workloads += [Workload("network", network.synthetic(), 2), stages.end_to_end(loader, network, "together")]
    elif args.need:
        workloads.append(stages.end_to_end(loader, _Pace(args.need), "together"))
    figures = measure(workloads, args.seconds, args.repeats)
    measured = Measured(tuple(figures[stage.name] for stage in alone), figures["loader"],
                        figures["network"].rate if args.model else args.need, figures.get("together"), args.model)
    cumulative = [replace(figures[stage.name], name=stage.name.removeprefix("up to ")) for stage in cut]
    return measured, tuple([figures["read"], *cumulative] if cut else [])


class _Pace:
    """A consumer of so many images/s: it holds a batch as long as a network of that rate would. That the clock wakes it late is
    made up for; that it waits for a batch is not."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._done = self._asked = 0.0  # when it should have been done with a batch, and when it asked for the next

    def __call__(self, batch: Batch) -> None:
        now = time.perf_counter()
        self._done = max(now, self._done + (now - self._asked) + len(batch.ids) / self._rate)
        time.sleep(max(0.0, self._done - time.perf_counter()))
        self._asked = time.perf_counter()


def _check_comparable(data: DataConfig) -> None:
    """Raises ValueError when the crops are not the paper's, which is what the other loaders make too."""
    if (data.region, data.square_px, data.crop_px) != (PAPER.region, PAPER.square_px, PAPER.crop_px):
        raise ValueError(f"--compare (=True) has {PAPER.crop_px} of {PAPER.square_px} px, and this recipe {data.crop_px} of "
                         f"{data.square_px}; leave it out, or profile the paper's crops with --index")


def compared(what: Subject, seconds: float, rounds: int) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """This tier and other people's loaders on the same kind of files, interleaved, each in a process of its own with as many
    workers (tools/bench): label → images/s of each round, ours first; and those that could not run, with the reason."""
    from tools.bench import rounds as bench  # compares with libraries that a profile does not need
    from tools.bench.contenders import CONTENDERS
    from tools.bench.workload import Task

    packed = what.index.path if what.index.packed is not None else None
    stats = stats_path(what.index.path, what.data.square_px, what.split)
    kind = {"archives": "original", "resident": "decoded"}.get(what.tier, "packed")
    others = [other.name for other in CONTENDERS.values() if other.role != "ours" and other.data == kind]
    with tempfile.TemporaryDirectory() as scratch:
        task = Task(what.index.path, packed, stats, Path(scratch), what.split, what.batch, what.machine.threads)
        results = bench.measure(task, [what.tier, *others], rounds, seconds)
    return ({result.contender.label: tuple(result.rates) for result in results if result.turns},
            tuple(f"{result.contender.label}: {result.reason}" for result in results if not result.turns))
