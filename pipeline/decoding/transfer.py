"""Small arrays of a batch, to the device in one copy that nobody waits for."""
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # bytes, of each array in a block


def to_device(device: torch.device, *arrays: npt.NDArray[Any]) -> list[torch.Tensor]:
    """The arrays as tensors on a device. To a GPU they go together, in one pinned block and one copy on the current stream, for
    which nobody waits; torch uses the block again only after it. On a CPU they share the arrays' memory."""
    return [torch.from_numpy(array) for array in arrays] if device.type == "cpu" else sent(device, arrays, pin=True)


def sent(device: torch.device, arrays: Sequence[npt.NDArray[Any]], *, pin: bool) -> list[torch.Tensor]:
    """`to_device` by way of a block, pinned or not."""
    ends = list(itertools.accumulate(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays))
    block = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pin)
    bytes_, starts = block.numpy(), [0, *ends[:-1]]
    for array, start in zip(arrays, starts, strict=True):
        bytes_[start:start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = block.to(device, non_blocking=True)
    return [there[start:start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
            for array, start in zip(arrays, starts, strict=True)]
