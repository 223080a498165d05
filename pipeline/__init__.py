"""Bytes on disk become a `Batch` on a device: index, sampling, reading, decoding, loading.

The names below are the public face; torch and DALI are imported when one of them is first used.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import DataConfig, LoaderConfig
    from pipeline.index.sample_index import SampleIndex
    from pipeline.loading.batch import Batch
    from pipeline.loading.eval_loader import EvalLoader
    from pipeline.loading.train_loader import TrainLoader
    from pipeline.reading.quarantine import Quarantine, SampleError
    from pipeline.stats import Stats
    from pipeline.tiers import make_eval_loader, make_train_loader

__all__ = ["Batch", "DataConfig", "EvalLoader", "LoaderConfig", "Quarantine", "SampleError", "SampleIndex", "Stats",
           "TrainLoader", "make_eval_loader", "make_train_loader"]

_HOME = {"DataConfig": "config", "LoaderConfig": "config", "SampleIndex": "index.sample_index", "Batch": "loading.batch",
         "EvalLoader": "loading.eval_loader", "TrainLoader": "loading.train_loader", "Quarantine": "reading.quarantine",
         "SampleError": "reading.quarantine", "Stats": "stats", "make_eval_loader": "tiers",
         "make_train_loader": "tiers"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pipeline.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
