"""The slow, obviously right pipeline: PIL decodes and resizes the whole image, NumPy cuts, mirrors and subtracts.

It shares only the draws with the code under test: how an image becomes a crop is written here a second time, from paper §2
and §4.1.
"""
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config import DataConfig

# Decoders agree on JPEG, and torch resizes as PIL does, rounding after columns and after rows, but with weights of 16 bits where
# PIL's have 22. Measured on ImageNet photographs: mean 0.002, largest 2.
MEAN_TOLERANCE, LARGEST_TOLERANCE = 0.07, 2.01
PAPER = DataConfig(region="square", square_px=256, crop_px=227, mirror=True, lighting=0.1, mean="image")

Float = npt.NDArray[np.float32]


def resized(blob: bytes, short_px: int) -> npt.NDArray[np.uint8]:
    """(h, w, 3) uint8: the image, its short side `short_px`, by PIL's antialiased linear filter."""
    image = Image.open(io.BytesIO(blob)).convert("RGB")
    width, height = image.size
    scale = short_px / min(width, height)
    size = (max(short_px, int(width * scale + 0.5)), max(short_px, int(height * scale + 0.5)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def square(blob: bytes, square_px: int) -> npt.NDArray[np.uint8]:
    """(S, S, 3) uint8: the central square."""
    pixels = resized(blob, square_px)
    top, left = (pixels.shape[0] - square_px) // 2, (pixels.shape[1] - square_px) // 2
    return pixels[top:top + square_px, left:left + square_px]


def training_crop(blob: bytes, *, region: str, square_px: int, crop_px: int, top: int, left: int, mirror: bool,
                  shift: Float, mean: Float) -> Float:
    """(3, crop, crop) float32 training crop: pixel - mean + lighting shift.

    `mean` is (S, S, 3), a (crop, crop, 3) piece, or (3,); an (S, S, 3) mean is cut and mirrored with the crop.
    """
    pixels = square(blob, square_px) if region == "square" else resized(blob, square_px)
    crop = pixels[top:top + crop_px, left:left + crop_px].astype(np.float32)
    whole = mean.ndim == 3 and mean.shape[0] == square_px
    if whole:
        crop = crop - mean[top:top + crop_px, left:left + crop_px]
    crop = crop[:, ::-1] if mirror else crop
    if not whole:
        crop = crop - mean
    return np.ascontiguousarray((crop + shift).transpose(2, 0, 1))


def ten_views(blob: bytes, *, square_px: int, crop_px: int, mean: Float) -> Float:
    """(10, 3, crop, crop): four corners and centre, then their reflections (paper §4.1); `mean` (S, S, 3) or (3,)."""
    pixels = square(blob, square_px).astype(np.float32) - mean
    far, middle = square_px - crop_px, (square_px - crop_px) // 2
    crops = [pixels[t:t + crop_px, s:s + crop_px] for t, s in ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))]
    return np.stack([c.transpose(2, 0, 1) for c in crops + [c[:, ::-1] for c in crops]])
