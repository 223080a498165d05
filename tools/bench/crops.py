"""Decode and crop with other people's libraries (PIL, OpenCV, simplejpeg with torch): JPEG bytes to a crop, then to floats.

Nothing is decoded less exactly than ours decodes it. What a crop and its parameters are: `tools.bench.workload`.
"""
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch

from tools.bench.workload import CROP_PX, SQUARE_PX, Augmented, Ids, Parameters, Photographs, Pixels, need, resized_size

Crop = Callable[[Any, int, int], Pixels]  # (bytes of a JPEG, top, left) → (crop, crop, 3) uint8, possibly a view


def decode(data: Any) -> Pixels:
    """(H, W, 3) of a JPEG by libjpeg-turbo, with the exact transforms; of another format by PIL."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
        return pixels
    except ValueError:  # one in thousands is CMYK or a PNG
        return np.array(need("PIL.Image").open(io.BytesIO(bytes(data))).convert("RGB"))


def _slices(width: int, height: int, top: int, left: int) -> tuple[slice, slice]:
    """Rows and columns of a crop in a picture whose short side is 256."""
    y, x = (height - SQUARE_PX) // 2 + top, (width - SQUARE_PX) // 2 + left
    return slice(y, y + CROP_PX), slice(x, x + CROP_PX)


def crop_pil(data: Any, top: int, left: int) -> Pixels:
    """PIL alone; of the resize only what the crop shows."""
    Image = need("PIL.Image")
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    width, height = resized_size(image.size)
    rows, columns = _slices(width, height, top, left)
    across, down = image.size[0] / width, image.size[1] / height
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    return np.asarray(image.resize((CROP_PX, CROP_PX), Image.Resampling.BILINEAR, box=box))


def crop_opencv(data: Any, top: int, left: int) -> Pixels:
    """simplejpeg and OpenCV, whose antialiased resize is the mean over areas."""
    cv2, pixels = need("cv2"), decode(data)
    size = resized_size((pixels.shape[1], pixels.shape[0]))
    resized: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return resized[_slices(*size, top, left)]


def crop_torch(data: Any, top: int, left: int) -> Pixels:
    """simplejpeg and torch's antialiased resize of uint8: the fastest of those tried, and exact. Of 256-px data, no resize."""
    pixels = decode(data)
    width, height = resized_size((pixels.shape[1], pixels.shape[0]))
    if pixels.shape[:2] != (height, width):
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy()
    return pixels[_slices(width, height, top, left)]


class Cropper:
    """(id, top, left) → crop: bytes through a crop function, or (None) a slice of a file of resized images, made before there are
    several threads or processes that would. Travels to workers."""

    def __init__(self, photographs: Photographs, crop: Crop | None) -> None:
        self.photographs, self.crop = photographs, crop
        # copy on write: torch warns of arrays it must not write to
        self._resized: Any = None if crop is not None else np.load(photographs.resized_file(), mmap_mode="c")

    def __reduce__(self) -> tuple[Any, ...]:
        return Cropper, (self.photographs, self.crop)

    def __call__(self, id: int, top: int, left: int) -> Pixels:
        """(crop, crop, 3) uint8."""
        if self.crop is not None:
            return self.crop(self.photographs.read(id), top, left)
        row = int(np.searchsorted(self.photographs.ids, id))
        crop: Pixels = self._resized[row, top:top + CROP_PX, left:left + CROP_PX]
        return crop


class Normalize:
    """Crops to floats by torch, the fastest tried: copy, subtract the mean image's piece, add the colour jitter. Buffers are
    reused in turn: a batch lasts until `lasting` more have been made."""

    def __init__(self, photographs: Photographs, lasting: int = 2) -> None:
        self._mean = torch.from_numpy(photographs.stats.mean_image_chw)
        shape = (photographs.task.batch, 3, CROP_PX, CROP_PX)
        self._buffers = itertools.cycle([torch.empty(shape) for _ in range(lasting + 1)])

    def batch(self, crops: Any, ids: Ids, parameters: Parameters) -> Augmented:
        """A batch of crops (B, crop, crop, 3), or an iterable of them. Safe to call from any thread."""
        out = next(self._buffers)
        for row, crop, numbers in zip(out, crops, parameters.tolist()):
            self._image(row, np.asarray(crop), numbers)
        return Augmented(out, ids, parameters)

    def _image(self, out: torch.Tensor, crop: Pixels, parameters: Sequence[float]) -> None:
        top, left, flip = (int(number) for number in parameters[:3])
        pixels, mean = torch.from_numpy(crop).permute(2, 0, 1), self._mean[:, top:top + CROP_PX, left:left + CROP_PX]
        if flip:
            out.copy_(pixels.flip(-1)).sub_(mean.flip(-1))
        else:
            out.copy_(pixels).sub_(mean)
        out.add_(out.new_tensor(parameters[3:])[:, None, None])
