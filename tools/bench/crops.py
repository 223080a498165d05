"""Decode and crop with other people's libraries (PIL, simplejpeg with torch): JPEG bytes to a crop, then to floats.

Nothing is decoded less exactly than ours decodes it. What a crop and its parameters are: `tools.bench.workload`.
"""
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch

from tools.bench.workload import (SQUARE_PX, WORKS, Augmented, Ids, Parameters, Photographs, Pixels, box_of, need,
                                  resized_size)

Crop = Callable[[Any, Sequence[float]], Pixels]  # (bytes of a JPEG, parameters) → (crop, crop, 3) uint8, possibly a view
CROP_PX, BOX_PX = (WORKS[name].crop_px for name in ("alexnet", "random_resized"))


def decode(data: Any) -> Pixels:
    """(H, W, 3) of a JPEG by libjpeg-turbo, with the exact transforms; of another format by PIL."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        return pixels
    except ValueError:  # one in thousands is CMYK or a PNG
        return np.array(need("PIL.Image").open(io.BytesIO(bytes(data))).convert("RGB"))


def _slices(width: int, height: int, numbers: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a crop in a picture whose short side is 256."""
    y, x = (height - SQUARE_PX) // 2 + int(numbers[0]), (width - SQUARE_PX) // 2 + int(numbers[1])
    return slice(y, y + CROP_PX), slice(x, x + CROP_PX)


def crop_pil(data: Any, numbers: Sequence[float]) -> Pixels:
    """PIL alone; of the resize only what the crop shows."""
    Image = need("PIL.Image")
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    width, height = resized_size(image.size)
    rows, columns = _slices(width, height, numbers)
    across, down = image.size[0] / width, image.size[1] / height
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    return np.asarray(image.resize((CROP_PX, CROP_PX), Image.Resampling.BILINEAR, box=box))


def crop_torch(data: Any, numbers: Sequence[float]) -> Pixels:
    """simplejpeg and torch's antialiased resize of uint8: the fastest of those tried, and exact. Of 256-px data, no resize."""
    pixels = decode(data)
    width, height = resized_size((pixels.shape[1], pixels.shape[0]))
    return _resized(pixels, height, width)[_slices(width, height, numbers)]


def box_pil(data: Any, numbers: Sequence[float]) -> Pixels:
    """PIL alone, as torchvision does it."""
    Image = need("PIL.Image")
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    top, left, height, width = box_of(image.size[1], image.size[0], numbers)
    box = image.crop((left, top, left + width, top + height))
    return np.asarray(box.resize((BOX_PX, BOX_PX), Image.Resampling.BILINEAR))


def box_torch(data: Any, numbers: Sequence[float]) -> Pixels:
    """simplejpeg and torch's antialiased resize of uint8."""
    return _resized(np.ascontiguousarray(_box(decode(data), numbers)), BOX_PX, BOX_PX)


def _box(pixels: Pixels, numbers: Sequence[float]) -> Pixels:
    top, left, height, width = box_of(pixels.shape[0], pixels.shape[1], numbers)
    return pixels[top:top + height, left:left + width]


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return np.asarray(found[0].permute(1, 2, 0).numpy())


CROPS: dict[str, dict[str, Crop]] = {"alexnet": {"pil": crop_pil, "torch": crop_torch},
                                     "random_resized": {"pil": box_pil, "torch": box_torch}}


class Cropper:
    """(id, parameters) → crop: bytes through a crop function, named as in `CROPS`, or (None) of a file of resized images, made
    before there are several threads or processes that would. Travels to workers."""

    def __init__(self, photographs: Photographs, name: str | None) -> None:
        self.photographs, self.name, self.boxes = photographs, name, photographs.task.data.resized_boxes
        self.crop = None if name is None else CROPS[photographs.task.work][name]
        # copy on write: torch warns of arrays it must not write to
        self._resized: Any = None if name is not None else np.load(photographs.resized_file(), mmap_mode="c")

    def __reduce__(self) -> tuple[Any, ...]:
        return Cropper, (self.photographs, self.name)

    def __call__(self, id: int, numbers: Sequence[float]) -> Pixels:
        """(crop, crop, 3) uint8."""
        if self.crop is not None:
            return self.crop(self.photographs.read(id), numbers)
        square: Pixels = self._resized[int(np.searchsorted(self.photographs.ids, id))]
        if self.boxes:
            return _resized(np.ascontiguousarray(_box(square, numbers)), BOX_PX, BOX_PX)
        return square[_slices(SQUARE_PX, SQUARE_PX, numbers)]


class Normalize:
    """Crops to floats by torch, the fastest tried: copy, subtract the mean image's piece, add the colour jitter; or copy,
    subtract the mean, divide. Buffers are reused in turn: a batch lasts until `lasting` more have been made."""

    def __init__(self, photographs: Photographs, lasting: int = 2) -> None:
        data = photographs.task.data
        self._mean, self._size = torch.from_numpy(photographs.stats.mean_image_chw), data.crop_px
        self._mean_std = [255 * torch.tensor(values)[:, None, None] for values in (data.mean, data.std)] if data.std else None
        shape = (photographs.task.batch, 3, self._size, self._size)
        self._buffers = itertools.cycle([torch.empty(shape) for _ in range(lasting + 1)])

    def batch(self, crops: Any, ids: Ids, parameters: Parameters) -> Augmented:
        """A batch of crops (B, crop, crop, 3), or an iterable of them. Safe to call from any thread."""
        out = next(self._buffers)
        for row, crop, numbers in zip(out, crops, parameters.tolist()):
            top, left, flip = (int(number) for number in numbers[:3])
            pixels = torch.from_numpy(np.asarray(crop)).permute(2, 0, 1)
            row.copy_(pixels.flip(-1) if flip else pixels)
            if self._mean_std is not None:
                row.sub_(self._mean_std[0]).div_(self._mean_std[1])
            else:
                mean = self._mean[:, top:top + self._size, left:left + self._size]
                row.sub_(mean.flip(-1) if flip else mean).add_(out.new_tensor(numbers[3:])[:, None, None])
        return Augmented(out, ids, parameters)
