"""From uint8 crops to what the network sees: out = (pixel - mean at the crop's position) + shift, in float32 (paper §2, §4.1).

On a CPU row by row in threads: a row stays in the core's cache through its three passes. On a GPU the whole batch at once.
Both give the same bits. B batch, C channel, H row, W column, S side of the mean image."""
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from pipeline.decoding.resize import Buffers
from pipeline.sampling.augment import Augmentation


class Normalizer:
    """Flips crops, subtracts the mean and adds the shift. `mean_image` (3, S, S) float32: the piece at each crop's position,
    flipped with it, is subtracted; None: nothing, a channel mean is in the shift. `centered`: the central piece instead,
    whatever the position and never flipped (the release). `threads` of a CPU; unused on a GPU."""

    def __init__(self, crop_px: int, mean_image: npt.NDArray[np.float32] | None, *, centered: bool = False, threads: int,
                 device: torch.device = torch.device("cpu")) -> None:
        if mean_image is not None and centered:
            first = (mean_image.shape[-1] - crop_px) // 2
            mean_image = mean_image[:, first:first + crop_px, first:first + crop_px]
        self._crop, self._device, self._buffers, self._centered = crop_px, device, Buffers(), centered
        self._mean = None if mean_image is None else np.ascontiguousarray(mean_image)
        self.mean = None if self._mean is None else torch.from_numpy(self._mean).to(device)  # (3, S, S), centered (3, crop, crop)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "normalize") if device.type == "cpu" else None

    def begin(self, pixels: torch.Tensor | Sequence[torch.Tensor], augmentation: Augmentation) -> Callable[[], torch.Tensor]:
        """Begin to make (B, 3, crop, crop) float32 images of (B, 3, crop, crop) uint8 crops; gives what waits for them. On a
        CPU each row is asked for by the thread that needs it, so they may be a sequence that makes them then."""
        if self._pool is None:
            there = [torch.from_numpy(column).to(self._device) for column in
                     (augmentation.top, augmentation.left, augmentation.mirror, augmentation.shift)]
            return lambda: self.whole(pixels, *there)  # type: ignore[arg-type]  # to a GPU it is given whole
        out = self._buffers.take(len(pixels), 3, self._crop, self._crop)
        edges = np.linspace(0, len(pixels), self._threads + 1).astype(int)
        parts = [self._pool.submit(self._some, pixels, augmentation, out.numpy(), low, high)
                 for low, high in zip(edges, edges[1:])]

        def end() -> torch.Tensor:
            for part in parts:
                part.result()
            return out

        return end

    def _some(self, pixels: torch.Tensor | Sequence[torch.Tensor], augmentation: Augmentation, images: npt.NDArray[np.float32],
              low: int, high: int) -> None:
        """Rows low…high. In NumPy, which frees the interpreter's lock and starts no threads of its own; in few calls, since at
        each one threads wait for each other to get that lock back."""
        size, mean, shifts = self._crop, self._mean, augmentation.shift[:, :, None, None]
        tops, lefts, mirror = augmentation.top.tolist(), augmentation.left.tolist(), augmentation.mirror.tolist()
        memory = np.empty(images.shape[1:], np.float32)  # NumPy flips floats while it adds, and bytes one by one
        for row in range(low, high):
            image, top, left = images[row], tops[row], lefts[row]
            values = memory if mirror[row] else image
            np.copyto(values, pixels[row].numpy())
            if mean is not None and not self._centered:
                np.subtract(values, mean[:, top:top + size, left:left + size], out=values)
            if mirror[row]:
                values = values[:, :, ::-1]
            if mean is not None and self._centered:
                values = np.subtract(values, mean, out=image)
            np.add(values, shifts[row], out=image)

    def whole(self, pixels: torch.Tensor, top: torch.Tensor, left: torch.Tensor, mirror: torch.Tensor,
              shift: torch.Tensor) -> torch.Tensor:
        """(B, 3, crop, crop) float32 from (B, 3, crop, crop) uint8, and what is drawn for them (see `Augmentation`), all on the
        device, at once; the same bits as row by row."""
        flipped = mirror[:, None, None, None]
        images = torch.where(flipped, pixels.flip(-1), pixels).to(torch.float32)
        if self.mean is not None and self._centered:
            images -= self.mean
        elif self.mean is not None:
            windows = self.mean.unfold(1, self._crop, 1).unfold(2, self._crop, 1)  # (3, rows, columns, crop, crop) view
            pieces = windows[:, top, left].transpose(0, 1)
            images -= torch.where(flipped, pieces.flip(-1), pieces)
        images += shift[:, :, None, None]
        return images

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
