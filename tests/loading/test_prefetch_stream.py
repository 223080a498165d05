"""The way of batches to a device, with torch's CPU in the device's place, whose streams and events do nothing."""
import threading
from collections.abc import Generator

import numpy as np
import pytest
import torch

from pipeline.decoding.transfer import sent, to_device
from pipeline.loading.batch import Batch
from pipeline.loading.prefetch import Prefetcher, SideStream
from pipeline.monitor import Monitor

CPU = torch.device("cpu")


def test_arrays_of_every_kind_in_one_block() -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 1000, 7), random.random(7) < 0.5, random.normal(size=(7, 3)).astype(np.float32),
              np.zeros((0, 2), np.int64), random.integers(0, 9, (5, 4)).astype(np.int32)[:, ::2]]
    found = sent(CPU, arrays, pin=False)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    for array, tensor, plain in zip(arrays, found, to_device(CPU, *arrays), strict=True):
        assert tensor.dtype == plain.dtype and np.array_equal(tensor.numpy(), array) and np.array_equal(plain.numpy(), array)
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0


def batches(count: int, closed: list[str], fail_at: int = -1) -> Generator[Batch, None, None]:
    try:
        for step in range(count):
            if step == fail_at:
                raise ValueError("step 2")
            ids = np.full(2, step)
            yield Batch(torch.full((2, 3, 4, 4), float(step)), torch.from_numpy(ids), ids, ids, step)
    finally:
        closed.append(threading.current_thread().name)


def test_batches_made_aside_come_in_order_and_an_error_in_its_place() -> None:
    closed: list[str] = []
    side = SideStream(CPU)
    prefetcher = Prefetcher(side.made(batches(4, closed, fail_at=2)), 2, Monitor())
    for step in range(2):
        batch = side.take(next(prefetcher))
        assert batch.step == step and batch.images.eq(step).all()
    with pytest.raises(ValueError, match="step 2"):
        next(prefetcher)
    prefetcher.close()
    assert closed == ["loader"]


def test_what_makes_batches_aside_is_closed_with_them() -> None:
    closed: list[str] = []
    prefetcher = Prefetcher(SideStream(CPU).made(batches(100, closed)), 2, Monitor())
    next(prefetcher)
    assert not closed
    prefetcher.close()
    assert len(closed) == 1
