"""The loader cut off after one of its stages: everything before it runs at once, as always, and what it gives is thrown away.

The one concept: a loader makes batches from a stream with a graph at its end; with another graph, or without the finishing of
its pixels, it is the same loader that ends earlier.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import torch

from pipeline.config import LoaderConfig
from pipeline.decoding.dali import DecodeGraph, Graph, Inputs
from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader
from pipeline.resident.train_loader import ResidentLoader
from tools.profile.stages import arrived, image_bytes, touch
from pipeline.decoding.decoder import GraphPlan, Prepared, Stream
from pipeline.loading.streamed_loader import StreamedLoader
from tools.profile.measure import Workload


class _DecodePlan(GraphPlan):
    """A plan whose graph ends after the decoder."""

    def build(self, source: Iterator[Inputs]) -> Graph:
        return DecodeGraph(source, self.batch, self.side_px, resample=self.resample, machine=self.machine, threads=self.threads,
                           device_id=self.device_id)


class _NoGraph(Graph):
    """Takes inputs, touches their bytes when nobody has yet, and gives nothing."""

    def __init__(self, source: Iterator[Inputs], touching: bool) -> None:
        self._source, self._touching = source, touching

    def collect(self) -> torch.Tensor:
        inputs = next(self._source)
        if self._touching:
            for view in inputs.encoded:
                touch(view)
        return torch.empty(0)

    def rows(self) -> list[torch.Tensor]:
        return list(self.collect())

    def close(self) -> None:
        pass


class _ReadPlan(GraphPlan):
    """A plan without a graph: the bytes are all."""

    def build(self, source: Iterator[Inputs]) -> Graph:
        return _NoGraph(source, not self.machine.check_crc)


def cut_off(make: Callable[[LoaderConfig], TrainLoader], machine: LoaderConfig, stages: list[str],
            closers: ExitStack) -> list[Workload]:
    """The loader cut off after each of these stages (those from "read" to "colour"); loaders are closed by `closers`.

    Args:
        make: opens the loader with these settings.
    """
    works = []
    for stage in stages:
        if stage not in ("read", "crc", "decode", "resize", "colour"):
            continue
        loader = closers.enter_context(make(replace(machine, check_crc=machine.check_crc and stage != "read")))
        if isinstance(loader, ResidentLoader):
            return []   # three stages that follow one another in one thread: nothing to cut
        threads = max(1, machine.read_threads) if stage in ("read", "crc") else loader.threads
        works.append(Workload(stage, closers.enter_context(closing(_through(loader, stage))),
                              machine.prefetch + machine.read_threads + 3, None, threads))
    return works


def read_alone(make: Callable[[LoaderConfig], TrainLoader], machine: LoaderConfig, closers: ExitStack) -> list[Workload]:
    """Reading as a stage of tier streamed: in its order, the drawing of that order included. Nothing for other tiers."""
    loader = closers.enter_context(make(replace(machine, check_crc=False)))
    if not isinstance(loader, StreamedLoader):
        return []
    reading = max(1, machine.read_threads)
    return [Workload("read", closers.enter_context(closing(_through(loader, "read"))), machine.read_threads + 2, None, reading,
                     image_bytes(loader))]


def _through(loader: TrainLoader, last: str) -> Generator[int, None, None]:
    """Batches of a loader that ends after the stage `last`, without end."""
    plan = loader.plan(loader._sampler.share, loader.data.crop_px)
    if last != "colour":
        kind = {"read": _ReadPlan, "crc": _ReadPlan, "decode": _DecodePlan}.get(last, GraphPlan)
        ending = kind(plan.batch, plan.side_px, plan.resample, plan.machine, plan.threads, plan.device_id)
        setattr(loader, "_open", lambda steps, batch, side_px: Stream(steps, loader._prepare, loader._mend, ending, loader.meter))
        setattr(loader, "_begun", _unfinished)
    with closing(loader._produce(0)) as batches:
        for step in itertools.count(1):
            batch = next(batches)
            loader._step = step
            arrived(loader.device)
            yield len(batch.ids)


def _unfinished(colour: object, prepared: Prepared, pixels: object) -> Callable[[], Batch]:
    """A batch that is none yet."""
    return lambda: Batch(torch.empty(0), torch.empty(0), prepared.ids, np.zeros(0, np.int64), prepared.step)
