"""Runs a profile: from arguments to a subject (index, data, settings, tier), from a subject to all its figures.

The one concept: first the loader alone in a fresh process, for its memory and its trace; then everything in turns; then what
cannot take turns: cold files, the sweep, other people's loaders. B batch.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tools.profile import stages
from tools.profile.cold import cold_pass
from pipeline.config import DataConfig, LoaderConfig
from tools.profile.cutoff import cut_off, read_alone
from tools.profile.figures import STAGES, Facts, Measured, Stage
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.monitor import Event, Meter
from pipeline.parallel import cores
from pipeline.resident.train_loader import ResidentLoader
from pipeline.resident.capacity import memory
from pipeline.stats import Stats, stats_path
from tools.profile.sweep import Point, axes, sweep
from pipeline.tiers import check as check_tier, train_loader
from tools.profile.measure import Work, machine_cpu_s, rss_mb, take_turns
from tools.profile.verdict import verdict
from tools.profile.report import Profile
from train.config import Config
from train.parallel.topology import Topology, topology

PAPER = DataConfig(region="square", square_px=256, crop_px=227, mirror=True, lighting=0.1, mean="image")    # §2, §4.1
PAPER_BATCH = 128   # §5
_LENIENT = 0.05     # share of unreadable samples a profile passes over: it trains nothing


@dataclass(frozen=True)
class Subject:
    """What is profiled: a loader's arguments, the tier it comes from, its device and recipe. `kind`: arguments of that tier."""
    index: SampleIndex
    split: str
    data: DataConfig
    batch: int
    seed: int
    stats: Stats
    machine: LoaderConfig
    tier: str
    kind: dict[str, Any]
    device: torch.device
    config: Config | None

    @property
    def title(self) -> str:
        """In words."""
        return (f"{self.index.path}, {len(self.index.ids(self.split)):,} images of split {self.split}, tier {self.tier}, "
                f"{self.data.crop_px} of {self.data.square_px} px, batch {self.batch}, on {self.device}, "
                f"{self.machine.threads} of {cores()} cores for pixels")

    def loader(self, machine: LoaderConfig, meter: Meter | None = None, batch: int | None = None) -> TrainLoader:
        """A loader of it with these settings."""
        return train_loader(self.tier, self.index, self.split, self.data, batch or self.batch, self.seed, self.stats,
                            machine=machine, device_id=self._device_id, meter=meter, **self.kind)

    @property
    def _device_id(self) -> int | None:
        return self.device.index if self.device.type == "cuda" else None


def subject(asked: argparse.Namespace, where: Topology, config: Config | None) -> Subject:
    """What the arguments name. Raises ValueError when the index, its statistics or the tier's data are not there."""
    tier = asked.tier or (config.data.tier if config else "archives")
    path = asked.index or (config.data.index if config else None)
    if tier in ("packed", "streamed"):
        path = asked.packed or asked.index or (config.data.packed if config else "") or path  # the index may be the packed folder
    assert path is not None     # checked: --config or --index
    archives = str(asked.archives or (config.machine.archives if config else ""))
    store = archives if archives.startswith("s3://") else ""
    index = SampleIndex.load(path, None if store else archives or None)
    check_tier(tier, index)
    split = config.data.train_split if config else "train"
    if not store:
        index.check_archives(split)
    data = config.data.pixels() if config else PAPER
    if config:
        from train.build import loader_config
        machine = loader_config(config, where)
    else:
        machine = LoaderConfig(threads=cores())
    given = {name: getattr(asked, name) for name in ("threads", "read_threads", "prefetch", "queue")}
    machine = replace(machine, quarantine_budget=max(_LENIENT, machine.quarantine_budget),
                      **{name: value for name, value in given.items() if value is not None})
    machine = replace(machine, threads=machine.threads or cores())
    batch = asked.batch or (config.train.batch if config else PAPER_BATCH)
    kind = {"resident": asked.resident or (config.data.resident if config else "rgb"), "store": store,
            **({"window": config.data.window, "lanes": config.data.lanes} if config else {})}
    return Subject(index, split, data, min(batch, len(index.ids(split))), config.train.seed if config else 0,
                   Stats.for_index(index, data.square_px, split), machine, tier, kind, where.device, config)


@dataclass(frozen=True)
class _Warm:
    """What was measured while the loaders were open: figures, stages cut off, events and queue depths of the first run, and
    the share of the machine's cores that other programs used."""
    measured: Measured
    cumulative: tuple[Stage, ...]
    events: tuple[Event, ...]
    depths: tuple[tuple[float, int], ...]
    others: float


def measure(asked: argparse.Namespace) -> tuple[Profile, Sequence[Event], Sequence[tuple[float, int]]]:
    """The profile that the (checked) arguments ask for, and the events and queue depths of its first run for a trace."""
    from train.recipe import load

    config = load(asked.config) if asked.config else None
    device = asked.device or (config.machine.device if config else "auto")
    with topology(towers=config.model.towers if config else 1, device=device, timeout_s=60.0) as where:
        what = subject(asked, where, config)
        if asked.compare:
            _check_comparable(what.data)
        warm = _warm(asked, what, where)
        # From here on threads are idle, and no loader has the archives mapped.
        cold, note = None, ""
        if asked.cold:
            turns, note = cold_pass(lambda: what.loader(what.machine), what.index, what.split, asked.seconds,
                                    min(3, asked.repeats))
            cold = stages.as_loader(turns)
        points = _swept(what, asked.seconds) if asked.sweep else []
        others, absent = compared(what, asked.seconds, asked.repeats) if asked.compare else ({}, ())
    measured, found = warm.measured, facts(what, warm.others)
    need_from = "" if measured.need is None else "the network's own step, measured" if asked.model else "as stated"
    profile = Profile(what.title, what.batch, measured, found, verdict(measured, found), warm.cumulative, cold, note, need_from,
                      tuple((point.settings, point.rate, point.cpu_ms) for point in points), others, absent, _versions())
    return profile, warm.events, warm.depths


def _warm(asked: argparse.Namespace, what: Subject, where: Topology) -> _Warm:
    meter = Meter(trace=asked.trace is not None, nvtx=asked.nvtx)
    before, start, cpu = rss_mb(), time.perf_counter(), machine_cpu_s() - time.process_time()
    with ExitStack() as closers:
        loader = closers.enter_context(what.loader(what.machine, meter))
        if isinstance(loader, ResidentLoader):
            loader.fill()
        first = take_turns([stages.whole(loader)], max(asked.seconds, 1.0), 1)["loader"]
        events, depths = tuple(meter.events), tuple(meter.depths)
        measured, cumulative = _in_turns(asked, what, where, loader, closers)
    measured = replace(measured, loader=replace(measured.loader, rss_mb=(before, *first.rss_mb[1:])))
    seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
    return _Warm(measured, cumulative, events, depths, max(0.0, (machine_cpu_s() - time.process_time() - cpu) / seconds))


def _swept(what: Subject, seconds: float) -> list[Point]:
    most = len(what.index.ids(what.split))
    along = [(name, [value for value in values if name != "batch" or value <= most])
             for name, values in axes(what.machine, what.batch, cores(), what.device.type == "cuda")]
    return sweep(lambda machine, batch: what.loader(machine, batch=batch), what.machine, what.batch, along, seconds, 2)


def _in_turns(asked: argparse.Namespace, what: Subject, where: Topology, loader: TrainLoader,
              closers: ExitStack) -> tuple[Measured, tuple[Stage, ...]]:
    """All figures that are taken in turns, and the stages of the loader cut off after each."""
    works = [*read_alone(what.loader, what.machine, closers), *stages.alone(loader, closers)]
    works.sort(key=lambda work: STAGES.index(work.name))
    names = [work.name for work in works]
    cut = [replace(work, name=f"up to {work.name}") for work in cut_off(what.loader, what.machine, names, closers)]
    all_works, need = [*works, *cut, stages.whole(loader)], asked.need
    if asked.model:
        from tools.profile.network import NetworkStep
        assert what.config is not None
        network = NetworkStep(what.config, where)
        all_works += [Work("network", network.synthetic(what.batch), 2), stages.fed(loader, network)]
    elif need:
        all_works.append(stages.fed(loader, _Pace(need)))
    turns = take_turns(all_works, asked.seconds, asked.repeats)
    if asked.model:
        need = statistics.median(turns["network"].rates)
    measured = Measured(tuple(stages.as_stage(work, turns[work.name]) for work in works), stages.as_loader(turns["loader"]), need,
                        stages.as_together(turns["together"]) if need else None, asked.model)
    upto = {work.name.removeprefix("up to "): stages.as_stage(work, turns[work.name]) for work in cut}
    return measured, tuple(replace(stage, name=name) for name, stage in upto.items())


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


def facts(what: Subject, others: float) -> Facts:
    """Where and on what it is measured."""
    gpu = what.device.type == "cuda"
    rows = what.index.samples[what.index.ids(what.split)]
    return Facts(what.tier, what.machine, cores(), gpu, len(rows), what.data.square_px, float(rows["size"].mean()),
                 what.data.region == "square", memory()[0], torch.cuda.mem_get_info(what.device)[0] if gpu else 0,
                 _spinning(what.index, what.split), others)


def _spinning(index: SampleIndex, split: str) -> bool:
    """Whether the disk of the split's first archive says that it turns (virtual disks may say so without cause)."""
    device = os.stat(index.archive_path(int(index.samples["archive"][index.ids(split)[0]]))).st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for place in (folder, folder.parent):   # a partition's queue is its disk's
        with contextlib.suppress(OSError):
            return (place / "queue" / "rotational").read_text(encoding="ascii").strip() == "1"
    return False


def _check_comparable(data: DataConfig) -> None:
    """Raises ValueError when the crops are not the paper's, which is what the other loaders make too."""
    if (data.region, data.square_px, data.crop_px) != (PAPER.region, PAPER.square_px, PAPER.crop_px):
        raise ValueError(f"--compare (=True) has {PAPER.crop_px} of {PAPER.square_px} px, and this recipe {data.crop_px} of "
                         f"{data.square_px}; leave it out, or profile the paper's crops with --index")


def compared(what: Subject, seconds: float, repeats: int) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """This tier and other people's loaders on the same kind of files, in turns, each in a process of its own with as many
    workers (tools/bench/__main__.py): label → images/s of each turn, ours first; and those that could not run, with the reason.
    """
    from tools.bench import __main__ as bench, workload as bench_work
    from tools.bench.sides import SIDES

    packed = what.index.path if what.index.packed is not None else None
    stats = stats_path(what.index.path, what.data.square_px, what.split)
    kind = {"archives": "original", "resident": "decoded"}.get(what.tier, "packed")
    chosen = [what.tier, *(side.name for side in SIDES if side.role != "ours" and side.data == kind)]
    with tempfile.TemporaryDirectory() as scratch:
        work = bench_work.Work(what.index.path, packed, stats, Path(scratch), what.split, what.batch, what.machine.threads)
        results = bench.measure(work, chosen, repeats, seconds)
    return ({result.side.label: tuple(turn.rate for turn in result.turns) for result in results if result.turns},
            tuple(f"{result.side.label}: {result.reason}" for result in results if not result.turns))


def _versions() -> dict[str, str]:
    names = ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numpy")
    found = {name: metadata.version(name) for name in names if any(True for _ in metadata.distributions(name=name))}
    return {**found, "python": platform.python_version()}
