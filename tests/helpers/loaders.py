"""The loaders of a tier for tests: `Batch` objects, and what a recipe states given in order."""
from typing import Any

from pipeline.config import DataConfig
from pipeline.index.sample_index import SampleIndex
from pipeline.loading.eval_loader import EvalLoader, square_loader
from pipeline.loading.train_loader import TrainLoader
from pipeline.stats import Stats
from pipeline.tiers import make_eval_loader, make_train_loader


def train_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, seed: int, stats: Stats,
                 **options: Any) -> TrainLoader:
    return make_train_loader(index, split, batch, data=data, tier=tier, seed=seed, stats=stats, return_batch=True, **options)


def eval_loader(tier: str, index: SampleIndex, split: str, data: DataConfig, batch: int, stats: Stats | None,
                **options: Any) -> EvalLoader:
    """Without `stats` the pixels themselves, (B, S, S, 3) uint8, from an index whatever the tier."""
    if stats is None:
        return square_loader(index, split, data, batch, None, **options)
    return make_eval_loader(index, split, batch, data=data, tier=tier, stats=stats, return_batch=True, **options)
