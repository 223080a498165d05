"""From uint8 pixels to what the network sees: crop, reflection, mean, lighting noise (paper §2, §4.1), in float32.

    out = (pixel - mean at the crop's place) + shift

On a CPU row by row in threads: a row stays in the core's cache through its three passes. On a GPU the whole batch at once.
Both give the same bits. B batch, C channel, H row, W column, S side of the mean image.
"""
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_SPARE = 4  # free buffers kept
_SERIAL = 32768  # values from which torch works in several threads (at::internal::GRAIN_SIZE)


@dataclass(frozen=True)
class Finish:
    """How the pixels of B samples become images.

    Attributes:
        top, left: (B,) int64 offset of the crop in the pixels given; zeros when they are the crop already.
        mirror: (B,) bool, reflect the crop.
        mean_top, mean_left: (B,) int64 offset of the piece of the mean image that is subtracted.
        mean_mirror: (B,) bool, reflect that piece too.
        shift: (B, 3) float32 added to every pixel: lighting noise, less a channel mean.
    """
    top: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    mirror: npt.NDArray[np.bool_]
    mean_top: npt.NDArray[np.int64]
    mean_left: npt.NDArray[np.int64]
    mean_mirror: npt.NDArray[np.bool_]
    shift: npt.NDArray[np.float32]

    def rows(self, rows: "slice | npt.NDArray[np.bool_] | npt.NDArray[np.int64]") -> "Finish":
        """That of some of the samples."""
        return Finish(self.top[rows], self.left[rows], self.mirror[rows], self.mean_top[rows], self.mean_left[rows],
                      self.mean_mirror[rows], self.shift[rows])


class Buffers:
    """CPU tensors of one type whose memory is used again once nobody refers to it.

    A fresh 40 MB tensor costs 10,000 page faults, half as much as the arithmetic that fills it.
    """

    def __init__(self, dtype: npt.DTypeLike = np.float32) -> None:
        self._dtype, self._size = dtype, 0
        self._free: deque[npt.NDArray[Any]] = deque(maxlen=_SPARE)

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor of this shape, contents undefined."""
        size = math.prod(shape)
        if size > self._size:  # what there is, is too small: from now on all are of this size
            self._size, self._free = size, deque(maxlen=_SPARE)
        free = self._free
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(self._size, self._dtype)
        # The tensor and all its views keep this very array object alive; when it goes, the memory behind it is free. (Appending
        # to a deque needs no lock, which a finalizer, run at any moment, must not take.)
        alias = memory[:size].reshape(shape)
        weakref.finalize(alias, free.append, memory).atexit = False
        return torch.from_numpy(alias)


class Colour:
    """Finishes images.

    Args:
        crop_px: side of the images.
        mean_image: (3, S, S) float32, or None when only `Finish.shift` is applied.
        threads: of a CPU; unused on a GPU.
        device: of the pixels and the images.
    """

    def __init__(self, crop_px: int, mean_image: npt.NDArray[np.float32] | None, *, threads: int,
                 device: torch.device = torch.device("cpu")) -> None:
        self._crop, self._device, self._buffers = crop_px, device, Buffers()
        self._mean = None if mean_image is None else np.ascontiguousarray(mean_image)
        self._mean_there = None if mean_image is None else torch.from_numpy(self._mean).to(device)
        self._reflected = None if mean_image is None else np.ascontiguousarray(mean_image[..., ::-1])
        # NumPy reflects bytes one by one, torch many at once where they lie densely; but from this many values on torch starts
        # threads of its own, which on a busy machine wait for each other longer than they work.
        self._flipped = max(1, (_SERIAL - 1) // (3 * crop_px))
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "colour") if device.type == "cpu" else None

    def __call__(self, rows: Sequence[torch.Tensor], finish: Finish) -> torch.Tensor:
        """(B, 3, crop, crop) float32 from B views (3, H, W) uint8 in CPU memory, each with its own H and W."""
        return self.begin(rows, finish)()

    def begin(self, rows: Sequence[torch.Tensor], finish: Finish) -> Callable[[], torch.Tensor]:
        """Begin what a call does, in the threads; gives what waits for it. Each row is asked for by the thread that needs it."""
        assert self._pool is not None, "rows are for CPUs"
        out = self._buffers.take(len(rows), 3, self._crop, self._crop)
        edges = np.linspace(0, len(rows), self._threads + 1).astype(int)
        parts = [self._pool.submit(self._some, rows, finish, out, low, high) for low, high in zip(edges, edges[1:])]

        def end() -> torch.Tensor:
            for part in parts:
                part.result()
            return out

        return end

    def _some(self, rows: Sequence[torch.Tensor], finish: Finish, out: torch.Tensor, low: int, high: int) -> None:
        """Rows low…high. In NumPy, which frees the interpreter's lock and starts no threads of its own; in few calls, since at
        each one threads wait for each other to get that lock back."""
        size = self._crop
        images = out.numpy()
        for row in range(low, high):
            top, left, image = int(finish.top[row]), int(finish.left[row]), images[row]
            pixels = rows[row][:, top:top + size, left:left + size]
            mirrored = bool(finish.mirror[row])
            dense = pixels.stride(2) == 1 or pixels.stride(1) == 3 * size
            if mirrored and dense:
                for first in range(0, size, self._flipped):
                    block = slice(first, first + self._flipped)
                    np.copyto(image[:, block], pixels[:, block].flip(-1).numpy())
            planes = pixels.numpy()[:, :, ::-1] if mirrored else pixels.numpy()
            top, left, mean = int(finish.mean_top[row]), int(finish.mean_left[row]), self._mean
            if self._reflected is not None and finish.mean_mirror[row]:
                mean, left = self._reflected, self._reflected.shape[-1] - size - left
            if not (mirrored and dense):
                np.copyto(image, planes)
            if mean is not None:
                np.subtract(image, mean[:, top:top + size, left:left + size], out=image)
            np.add(image, finish.shift[row][:, None, None], out=image)

    def whole(self, pixels: torch.Tensor, finish: Finish) -> torch.Tensor:
        """(B, 3, crop, crop) float32 from (B, 3, H, W) uint8 on the device, all at once; the same bits as row by row."""
        images = _reflected(_cut(pixels, finish.top, finish.left, self._crop), finish.mirror).to(torch.float32)
        if self._mean_there is not None:
            windows = self._mean_there.unfold(1, self._crop, 1).unfold(2, self._crop, 1)  # (3, rows, columns, crop, crop) view
            piece = windows[:, self._index(finish.mean_top), self._index(finish.mean_left)].transpose(0, 1)
            images -= _reflected(piece, finish.mean_mirror)
        images += torch.from_numpy(finish.shift).to(self._device)[:, :, None, None]
        return images

    def _index(self, places: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(places).to(self._device)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _cut(pixels: torch.Tensor, top: npt.NDArray[np.int64], left: npt.NDArray[np.int64], size: int) -> torch.Tensor:
    """(B, 3, size, size) crops of (B, 3, H, W), each at its own place."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    windows = pixels.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, rows, columns, size, size), a view
    rows, columns = (torch.from_numpy(offsets).to(pixels.device) for offsets in (top, left))
    return windows[torch.arange(len(pixels), device=pixels.device), :, rows, columns]


def _reflected(images: torch.Tensor, mirror: npt.NDArray[np.bool_]) -> torch.Tensor:
    """Those of (B, …, W) that `mirror` names reflected."""
    if not mirror.any():
        return images
    return torch.where(torch.from_numpy(mirror).to(images.device)[:, None, None, None], images.flip(-1), images)
