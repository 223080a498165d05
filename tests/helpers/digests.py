"""Batches of a loader, and their hashes."""

from __future__ import annotations

import hashlib

from pipeline.loading.batch import Batch
from pipeline.loading.train_loader import TrainLoader


def digest(batches: list[Batch]) -> str:
    """Hash of ids, epochs, labels and pixels."""
    found = hashlib.sha256()
    for batch in batches:
        for array in (batch.ids, batch.epochs, batch.labels.numpy(), batch.images.numpy()):
            found.update(array.tobytes())
    return found.hexdigest()


def take(train: TrainLoader, steps: int) -> list[Batch]:
    """So many batches, across epochs."""
    found: list[Batch] = []
    while len(found) < steps:
        for batch in train:
            found.append(batch)
            if len(found) == steps:
                break
    return found
