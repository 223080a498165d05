"""Hashes of batches."""

from __future__ import annotations

import hashlib

from pipeline.loading.batch import Batch


def digest(batches: list[Batch]) -> str:
    """Hash of ids, epochs, labels and pixels."""
    found = hashlib.sha256()
    for batch in batches:
        for array in (batch.ids, batch.epochs, batch.labels.numpy(), batch.images.numpy()):
            found.update(array.tobytes())
    return found.hexdigest()
