"""Runs a profile: opens the recipe's loader, measures everything interleaved, then cold files, and judges."""
import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from pipeline.loading.batch import Batch
from pipeline.monitor import Event, Monitor
from pipeline.process_pool import cores
from pipeline.resident.capacity import memory
from pipeline.tiers import make_train_loader
from tools.profile import host, stages
from tools.profile.measure import Workload, measure
from tools.profile.network import NetworkStep
from tools.profile.report import Profile
from tools.profile.verdict import Measured, Setup, verdict
from train import build
from train.config import Config
from train.parallel.topology import process_group

_LENIENT = 0.05  # share of unreadable samples a profile passes over: it trains nothing


def profile(args: argparse.Namespace, config: Config) -> tuple[Profile, Sequence[Event]]:
    """The profile of a recipe that the (checked) arguments ask for, and the loader's first events for a trace."""
    data, split = config.data, config.data.train_split
    with process_group(towers=config.model.towers, device=config.machine.device, timeout_s=86400) as topology:
        index, gpu = build.index(config, split), topology.device.type == "cuda"
        machine = build.loader_config(config, topology)
        machine = replace(machine, quarantine_budget=max(_LENIENT, machine.quarantine_budget))
        images = len(index.ids(split))
        config = replace(config, train=replace(config.train, batch=min(config.train.batch, images)))
        title = (f"{index.path}, {images:,} images of split {split}, tier {data.tier}, {data.crop_px} of {data.square_px} px, "
                 f"batch {config.train.batch}, on {topology.device}, {machine.threads} of {cores()} cores for pixels")
        open_loader = partial(make_train_loader, index, split, config.train.batch, data=data, tier=data.tier,
                              seed=config.train.seed, resident=data.resident, window=data.window, lanes=data.lanes, shard=(0, 1),
                              store=config.machine.archives if config.in_bucket else "", device=topology.device,
                              return_batch=True)
        network = NetworkStep(config, topology) if args.model else None  # before DALI is there: it may be captured
        monitor = Monitor(trace=args.trace is not None, nvtx=args.nvtx)
        with ExitStack() as closers:
            loader = closers.enter_context(open_loader(machine=machine, monitor=monitor))
            loader.fill()
            if args.trace:
                measure([stages.end_to_end(loader)], args.seconds, 1)
            events = tuple(monitor.events)
            alone, cut = stages.workloads(loader, lambda changed: open_loader(machine=changed), closers)
            workloads = [*alone, *cut, stages.end_to_end(loader)]
            bare = None
            if cut:
                bare = host.without_pixels(open_loader(machine=machine), closers)
            elif machine.resident_memory == "ram":  # squares in GPU memory are not there twice
                bare = open_loader(machine=machine, data=replace(data, crop_px=1, crop="random"))
            if bare is not None:
                workloads.append(stages.end_to_end(closers.enter_context(bare), name="host"))
            if network is not None:
                workloads += [Workload("network", network.synthetic(), 2), stages.end_to_end(loader, network, "together")]
            elif args.need:
                workloads.append(stages.end_to_end(loader, _Pace(args.need), "together"))
            figures = measure(workloads, args.seconds, args.repeats)
            ceiling = None if bare is None else host.host(figures["host"], bare)
        cold, note = None, ""
        if args.cold:  # no loader has the archives mapped any more
            cold, note = stages.measure_cold(partial(open_loader, machine=machine), index, split, args.seconds, 3)
        setup = Setup(data.tier, machine, cores(), gpu, images, data.square_px, data.region == "square", memory()[0],
                      torch.cuda.mem_get_info(topology.device)[0] if gpu else 0, data.resident, data.crop == "random_resized")
    measured = Measured(tuple(figures[stage.name] for stage in alone), figures["loader"],
                        figures["network"].rate if args.model else args.need, figures.get("together"), not args.model)
    cumulative = [replace(figures[stage.name], name=stage.name.removeprefix("up to ")) for stage in cut]
    return Profile(title, config.train.batch, measured, setup, verdict(measured, setup),
                   tuple([figures["read"], *cumulative] if cut else []), cold, note,
                   "the network's own step, measured" if args.model else "stated with --need; no network was measured",
                   ceiling), events


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
