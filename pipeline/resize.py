"""Resizing on a CPU: antialiased linear, the pixels of PIL, only as far as the crop reaches. B images, H, W, S side of the crop.

torch's kernel for uint8 takes 0.2 ms of a core for an ImageNet photograph where DALI's takes 0.65. It samples from the image's
corner on, so the crop is cut from what lies above and to its left too; in return its pixels are those of the whole resized image,
whatever the crop, to the bit.
"""
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.colour import Buffers
from pipeline.geometry import Regions

_linear = torch.ops.aten._upsample_bilinear2d_aa.out  # functional.interpolate derives the output's size from the scale


def resize(image: torch.Tensor, offset: Sequence[int], size: Sequence[int], scale: Sequence[float],
           memory: torch.Tensor | None = None) -> torch.Tensor:
    """A crop of a resized image.

    Args:
        image: (h, w, 3) uint8, from its corner at least as far as the crop reaches.
        offset: of the crop in the resized image, (rows, columns).
        size: of the crop, (H, W).
        scale: source pixels for one of the resized image, (vertical, horizontal).
        memory: (n,) uint8 to work in, n >= (top + H)·(left + W)·3; or None.

    Returns:
        (H, W·3) uint8, a view of `memory`: the channels of a pixel side by side.
    """
    (top, left), (height, width) = offset, size
    rows, columns = top + height, left + width
    if memory is None:
        memory = torch.empty(rows * columns * 3, dtype=torch.uint8)
    whole = memory[:rows * columns * 3].view(rows, columns, 3)
    _linear(image.permute(2, 0, 1)[None], [rows, columns], False, 1 / scale[0], 1 / scale[1], out=whole.permute(2, 0, 1)[None])
    return whole.view(rows, columns * 3)[top:, left * 3:]


class Resizer:
    """Resizes decoded images and cuts the crop.

    Args:
        side_px: side S of the crop.
        threads: that share a batch.
    """

    def __init__(self, side_px: int, threads: int) -> None:
        self._side, self._threads, self._buffers = side_px, threads, Buffers(np.uint8)
        self.workers: set[int] = set()  # kernel ids of the threads
        self._pool = ThreadPoolExecutor(threads, "resize", lambda: self.workers.add(threading.get_native_id()))

    def __call__(self, decoded: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
        """(B, S, S, 3) uint8 crops.

        Args:
            decoded: B tensors (h, w, 3) uint8, each from its image's corner to the end of the region (or the image's end).
            regions: where the crops lie.
        """
        out = self._buffers.take(len(decoded), self._side, self._side, 3)
        edges = np.linspace(0, len(decoded), self._threads + 1).astype(int)
        parts = [self._pool.submit(self._some, decoded, regions, out.numpy(), low, high) for low, high in zip(edges, edges[1:])]
        for part in parts:
            part.result()
        return out

    def _some(self, decoded: Sequence[torch.Tensor], regions: Regions, out: np.ndarray, low: int, high: int) -> None:
        if low == high:
            return
        # One piece of memory for all: a fresh one for each image costs a third more time in page faults. (And without the axis of
        # channels NumPy copies whole rows, ten times as fast.)
        memory = torch.empty(int((regions.offset[low:high] + self._side).prod(axis=1).max()) * 3, dtype=torch.uint8)
        flat = out.reshape(len(out), self._side, self._side * 3)
        for row in range(low, high):
            offset, scale = regions.offset[row].tolist(), regions.scale[row].tolist()
            found = resize(decoded[row], offset, (self._side, self._side), scale, memory)
            np.copyto(flat[row], found.numpy())

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
