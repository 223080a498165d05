"""From uint8 crops to what the network sees: out = (pixel - mean at the crop's position) + shift, in float32 (paper §2, §4.1);
or (pixel + shift) · factor. Then it is rounded to another type, if need be.

On a CPU row by row in threads: a row stays in the core's cache through its passes. On a GPU the whole batch at once.
Both give the same bits. B batch, C channel, H row, W column, S side of the mean image."""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.resize import Buffers
from pipeline.decoding.transfer import to_device
from pipeline.sampling.augment import Augmentation


_CHUNK = 1 << 14  # values that torch converts in one thread; from twice as many on it would start some of its own


@dataclass(frozen=True)
class Finish:
    """What becomes of uint8 pixels, RGB."""
    mean_image: npt.NDArray[np.float32] | None  # (3, S, S): its piece at each crop's position, flipped with it, is subtracted
    centered: bool = False  # the central piece instead, whatever the position and never flipped (the release)
    channels_last: bool = False  # memory layout of the images
    factor: tuple[float, ...] | None = None  # what R, G, B are multiplied by at last, where there is no mean image
    output: str = "float32"  # type of the images; uint8: none of the above but the layout

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.output)
        return found

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def factors(self) -> npt.NDArray[np.float32]:
        """(3, 1, 1)."""
        return np.array(self.factor, np.float32)[:, None, None]


class Normalizer:
    """Flips crops, subtracts the mean and adds the shift, which holds a channel mean, if any. `threads` of a CPU; unused on a
    GPU."""

    def __init__(self, crop_px: int, finish: Finish, *, threads: int, device: torch.device = torch.device("cpu")) -> None:
        mean_image, centered = finish.mean_image, finish.centered
        if mean_image is not None and centered:
            first = (mean_image.shape[-1] - crop_px) // 2
            mean_image = mean_image[:, first:first + crop_px, first:first + crop_px]
        self._crop, self._device, self._finish, self._centered = crop_px, device, finish, centered
        # NumPy has no bfloat16; its memory is as good as any of two bytes.
        self._buffers = Buffers({torch.bfloat16: np.uint16}.get(finish.dtype, finish.output))
        self._factor = None if finish.factor is None else finish.factors()
        self._factors = None if self._factor is None else torch.from_numpy(self._factor).to(device)
        self._mean = None if mean_image is None else np.ascontiguousarray(mean_image)
        self.mean = None if self._mean is None else torch.from_numpy(self._mean).to(device)  # (3, S, S), centered (3, crop, crop)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "normalize") if device.type == "cpu" else None

    def begin(self, pixels: torch.Tensor | Sequence[torch.Tensor], augmentation: Augmentation) -> Callable[[], torch.Tensor]:
        """Begin to make (B, 3, crop, crop) images of (B, 3, crop, crop) uint8 crops; gives what waits for them. On a CPU each row
        is asked for by the thread that needs it, so they may be a sequence that makes them then."""
        if self._pool is None:
            there = to_device(self._device, augmentation.top, augmentation.left, augmentation.mirror, augmentation.shift)
            return lambda: self.whole(pixels, *there)  # type: ignore[arg-type]  # to a GPU it is given whole
        side, last = self._crop, self._finish.channels_last
        out = self._buffers.take(len(pixels), *((side, side, 3) if last else (3, side, side))).view(self._finish.dtype)
        out = out.permute(0, 3, 1, 2) if last else out
        edges = np.linspace(0, len(pixels), self._threads + 1).astype(int)
        some = self._flipped if self._finish.output == "uint8" else self._some
        parts = [self._pool.submit(some, pixels, augmentation, out, low, high) for low, high in zip(edges, edges[1:])]

        def end() -> torch.Tensor:
            for part in parts:
                part.result()
            return out

        return end

    def _some(self, pixels: torch.Tensor | Sequence[torch.Tensor], augmentation: Augmentation, out: torch.Tensor, low: int,
              high: int) -> None:
        """Rows low…high. In NumPy, which frees the interpreter's lock and starts no threads of its own; in few calls, since at
        each one threads wait for each other to get that lock back."""
        size, mean, shifts, factor = self._crop, self._mean, augmentation.shift[:, :, None, None], self._factor
        tops, lefts, mirror = augmentation.top.tolist(), augmentation.left.tolist(), augmentation.mirror.tolist()
        memory = np.empty((3, size, size), np.float32)  # NumPy flips floats while it adds, and bytes one by one
        direct = out.dtype == torch.float32 and not self._finish.channels_last
        images = out.numpy() if direct else None
        image = np.empty_like(memory)
        for row in range(low, high):
            image, top, left = image if images is None else images[row], tops[row], lefts[row]
            values = memory if mirror[row] else image
            np.copyto(values, pixels[row].numpy())
            if mean is not None and not self._centered:
                np.subtract(values, mean[:, top:top + size, left:left + size], out=values)
            if mirror[row]:
                values = values[:, :, ::-1]
            if mean is not None and self._centered:
                values = np.subtract(values, mean, out=image)
            np.add(values, shifts[row], out=image)
            if factor is not None:
                np.multiply(image, factor, out=image)
            if images is None:
                self._convert(image, out[row])

    def _convert(self, image: npt.NDArray[np.float32], out: torch.Tensor) -> None:
        """(3, crop, crop) float32, contiguous, to whatever type and layout."""
        lines = max(1, _CHUNK // (3 * self._crop))
        for to, values in zip(out.split(lines, dim=1), torch.from_numpy(image).split(lines, dim=1)):
            to.copy_(values)

    def _flipped(self, pixels: torch.Tensor | Sequence[torch.Tensor], augmentation: Augmentation, out: torch.Tensor, low: int,
                 high: int) -> None:
        """Rows low…high, as they are but for flips."""
        for row, mirror in enumerate(augmentation.mirror[low:high].tolist(), low):
            values = pixels[row].numpy()
            np.copyto(out[row].numpy(), values[:, :, ::-1] if mirror else values)

    def whole(self, pixels: torch.Tensor, top: torch.Tensor, left: torch.Tensor, mirror: torch.Tensor,
              shift: torch.Tensor) -> torch.Tensor:
        """(B, 3, crop, crop) from (B, 3, crop, crop) uint8, and what is drawn for them (see `Augmentation`), all on the device,
        at once; the same bits as row by row."""
        flipped = mirror[:, None, None, None]
        chosen = torch.where(flipped, pixels.flip(-1), pixels)
        if self._finish.output == "uint8":
            return chosen.contiguous(memory_format=self._finish.memory_format)
        images = chosen.to(torch.float32)
        if self.mean is not None and self._centered:
            images -= self.mean
        elif self.mean is not None:
            windows = self.mean.unfold(1, self._crop, 1).unfold(2, self._crop, 1)  # (3, rows, columns, crop, crop) view
            pieces = windows[:, top, left].transpose(0, 1)
            images -= torch.where(flipped, pieces.flip(-1), pieces)
        images += shift[:, :, None, None]
        if self._factors is not None:
            images *= self._factors
        return images.to(self._finish.dtype, memory_format=self._finish.memory_format)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
