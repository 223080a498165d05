"""Resizes decoded images and cuts their crops, on a CPU (on a GPU `graph.py` does, of squares in memory `resize_boxes`):
antialiased linear, the pixels of PIL, only as far as the crop reaches. B images, H, W, S side of the crop.

torch's kernel for uint8 takes 0.2 ms of a core for an ImageNet photograph where DALI's takes 0.65. It samples from the image's
corner on, so the crop is cut from what lies above and to its left too; in return its pixels are those of the whole resized
image, whatever the crop, to the bit."""
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.geometry import Regions

_SPARE = 4  # free buffers kept
_MOST = 64 << 20  # bytes to work in
_own = threading.local()  # .memory of each thread
# torch has no public name for it: functional.interpolate derives the size of the output from the scale.
_linear = getattr(torch.ops.aten, "_upsample_bilinear2d_aa").out


def resize(image: torch.Tensor, offset: Sequence[int], size: Sequence[int], scale: Sequence[float],
           memory: torch.Tensor | None = None) -> torch.Tensor:
    """A crop of a resized image: (H, W·3) uint8, a view of the memory, the channels of a pixel side by side. `image` (h, w, 3)
    uint8 reaches from its corner at least as far as the crop; `offset` and `size` of the crop are in the resized image, (rows,
    columns); `scale`: source pixels for one of the resized image, (vertical, horizontal); `memory` (n,) uint8 to work in, used
    when it is large enough, see `needed`."""
    (top, left), (height, width) = offset, size
    if needed(offset, size) > _MOST:
        image, top, left = _nearer(image, offset, scale)
    rows, columns = top + height, left + width
    # The kernel takes an axis whose size stays for one that needs no work, whatever the scale. Then one line more is asked for.
    more_rows = rows + (image.shape[0] == rows and scale[0] != 1)
    more_columns = columns + (image.shape[1] == columns and scale[1] != 1)
    if memory is None or len(memory) < more_rows * more_columns * 3:
        memory = torch.empty(more_rows * more_columns * 3, dtype=torch.uint8)
    whole = memory[:more_rows * more_columns * 3].view(more_rows, more_columns, 3)
    _linear(image.permute(2, 0, 1)[None], [more_rows, more_columns], False, 1 / scale[0], 1 / scale[1],
            out=whole.permute(2, 0, 1)[None])
    return whole.view(more_rows, more_columns * 3)[top:rows, left * 3:columns * 3]


def needed(offset: Sequence[int], size: Sequence[int]) -> int:
    """Bytes that `resize` works in."""
    return (offset[0] + size[0] + 1) * (offset[1] + size[1] + 1) * 3


def _nearer(image: torch.Tensor, offset: Sequence[int], scale: Sequence[float]) -> tuple[torch.Tensor, int, int]:
    """An image a few pixels high and thousands wide (or the reverse), begun near the crop instead of at its corner; and the
    crop's offset in that. It is so much enlarged that half a pixel of the result, by which this is off, is nothing."""
    offsets = []
    for axis in range(2):
        skipped = max(0, int(offset[axis] * scale[axis]) - int(scale[axis]) - 3)
        image = image.narrow(axis, skipped, image.shape[axis] - skipped)
        offsets.append(round(offset[axis] - skipped / scale[axis]))
    return image, offsets[0], offsets[1]


class LazyRows(Sequence[torch.Tensor]):
    """The images of a batch, each made (by `make`, row → image) by the thread that asks for it, in whose core's cache the
    pixels then lie."""

    def __init__(self, count: int, make: Callable[[int], torch.Tensor]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> torch.Tensor:  # type: ignore[override]  # no slices: images may share memory
        return self._make(row)


def planar_crops(decoded: Sequence[torch.Tensor], regions: Regions, side_px: int) -> LazyRows:
    """The crops of a batch, (3, S, S) uint8 views of (S, S, 3), each overwritten when the same thread asks for another crop, of
    whatever batch. `decoded`: B tensors (h, w, 3) uint8, from the corner to the end of the region (or the image's end)."""
    offsets, scales, size = regions.offset.tolist(), regions.scale.tolist(), (side_px, side_px)

    def make(row: int) -> torch.Tensor:
        memory = _memory(min(needed(offsets[row], size), _MOST))
        return resize(decoded[row], offsets[row], size, scales[row], memory).unflatten(1, (side_px, 3)).permute(2, 0, 1)

    return LazyRows(len(decoded), make)


def planar_boxes(squares: Sequence[torch.Tensor], top: Sequence[int], left: Sequence[int], sizes: Sequence[Sequence[int]],
                 side_px: int) -> LazyRows:
    """Boxes of squares (3, H, W) uint8, of `sizes` (rows, columns) at (top, left), resized to (3, S, S) uint8; to be used as
    `planar_crops`."""
    def make(row: int) -> torch.Tensor:
        (height, width), place = sizes[row], _memory(3 * side_px ** 2)
        box = squares[row][:, top[row]:top[row] + height, left[row]:left[row] + width]
        _linear(box[None].contiguous(), [side_px, side_px], False, None, None, out=place.view(1, 3, side_px, side_px))
        return place.view(3, side_px, side_px)

    return LazyRows(len(squares), make)


def resize_boxes(squares: torch.Tensor, top: torch.Tensor, left: torch.Tensor, sizes: torch.Tensor, side_px: int) -> torch.Tensor:
    """The same of a whole batch, (B, 3, H, W) → (B, 3, S, S) uint8, all on the device, sizes (B, 2): as two products with
    matrices of the filter's weights, rounded after columns and after rows."""
    def weights(first: torch.Tensor, size: torch.Tensor, extent: int) -> torch.Tensor:
        """(B, S, extent): of each source pixel in each of the result, zero outside the box."""
        pixel, result = (torch.arange(count, device=squares.device, dtype=torch.float32) for count in (extent, side_px))
        first, scale = first[:, None, None], (size / side_px)[:, None, None]
        centre = first + (result[:, None] + 0.5) * scale
        triangle = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
        triangle *= (pixel >= first) & (pixel < first + size[:, None, None])
        return triangle / triangle.sum(-1, keepdim=True)

    down, across = weights(top, sizes[:, 0], squares.shape[2]), weights(left, sizes[:, 1], squares.shape[3])
    columns = (squares.float() @ across[:, None].transpose(2, 3)).round_()
    return (down[:, None] @ columns).round_().clamp_(0, 255).to(torch.uint8)


def _memory(count: int) -> torch.Tensor:
    """At least so many bytes of this thread's own, kept, since fresh ones each time cost a third more, in page faults."""
    memory: torch.Tensor | None = getattr(_own, "memory", None)
    if memory is None or len(memory) < count:
        _own.memory = memory = torch.empty(count, dtype=torch.uint8)
    return memory[:count]


class Buffers:
    """CPU tensors of one type whose memory is used again once nobody refers to it: a fresh 40 MB tensor costs 10,000 page
    faults, half as much as the arithmetic that fills it."""

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


class Resizer:
    """Resizes decoded images and cuts the crop, of side S: a whole batch, in threads."""

    def __init__(self, side_px: int, threads: int) -> None:
        self._side, self._threads, self._buffers = side_px, threads, Buffers(np.uint8)
        self._pool = ThreadPoolExecutor(threads, "resize")

    def __call__(self, decoded: Sequence[torch.Tensor], regions: Regions) -> torch.Tensor:
        """(B, S, S, 3) uint8 crops; arguments as of `planar_crops`."""
        out = self._buffers.take(len(decoded), self._side, self._side, 3)
        flat = out.view(len(out), self._side, self._side * 3).numpy()  # without the axis of channels NumPy copies whole rows
        rows = planar_crops(decoded, regions, self._side)

        def some(low: int, high: int) -> None:
            for row in range(low, high):
                np.copyto(flat[row], rows[row].permute(1, 2, 0).flatten(1).numpy())

        edges = np.linspace(0, len(decoded), self._threads + 1).astype(int)
        list(self._pool.map(some, edges[:-1], edges[1:]))
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
