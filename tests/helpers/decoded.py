"""What the decoder gives for plans of a loader, with one set of settings or another."""
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch

from pipeline.decoding.dali import RegionPipeline
from pipeline.decoding.graph import DecodeSettings
from pipeline.loading.loader import DecodingChain
from pipeline.loading.train_loader import TrainLoader
from pipeline.sampling.augment import Augmentation
from pipeline.sampling.batch_plan import BatchPlan


def read(loader: TrainLoader) -> Iterator[BatchPlan]:
    """The plans of an epoch with their bytes."""
    assert isinstance(loader.chain, DecodingChain)
    with closing(loader.chain.read(range(len(loader)))) as plans:
        yield from plans


def pixels(plans: list[BatchPlan], settings: DecodeSettings) -> list[torch.Tensor]:
    with closing(RegionPipeline(iter(plans), settings)) as pipeline:
        return [pipeline.collect() for _ in plans]


def unfinished(plan: BatchPlan) -> BatchPlan:
    return replace(plan, augmentation=Augmentation.none(len(plan.ids)))
