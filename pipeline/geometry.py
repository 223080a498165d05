"""Where a crop lies in the source image: exact region decode, in NumPy.

Resizing the whole image and cropping it reads, for a crop at (y, x) of the resized image, the source rectangle
[y, y+crop)·H/h × [x, x+crop)·W/w. Decoding just that rectangle plus the filter's margin and resampling it *at those
continuous coordinates* gives the same pixels for less work. (Stretching the rounded rectangle instead is wrong by up to 193
grey levels.) B samples; H, W source size; h, w size after the resize; all pairs are (rows, columns).
"""
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Regions:
    """What to decode of each image and where to sample it.

    Attributes:
        anchor: (B, 2) int32 first source pixel to decode.
        shape: (B, 2) int32 source pixels to decode.
        start, end: (B, 2) float32 corners of the crop in continuous coordinates of the decoded rectangle; start > end in
            columns reflects the image, at no cost.
    """
    anchor: npt.NDArray[np.int32]
    shape: npt.NDArray[np.int32]
    start: npt.NDArray[np.float32]
    end: npt.NDArray[np.float32]


def resized(sizes: Pairs, short_px: int) -> Pairs:
    """(B, 2) size after resizing the short side to `short_px`; the long side is rounded half up to a whole pixel."""
    short = sizes.min(axis=1, keepdims=True)
    return (2 * sizes * short_px + short) // (2 * short)


def central(resized_sizes: Pairs, side_px: int) -> Pairs:
    """(B, 2) offset of the central square of side `side_px` (paper §2); an odd pixel too many goes below and right."""
    return (resized_sizes - side_px) // 2


def regions(sizes: Pairs, resized_sizes: Pairs, offsets: Pairs, crop_px: int,
            mirror: npt.NDArray[np.bool_] | None = None) -> Regions:
    """Source regions of square crops.

    Args:
        sizes: (B, 2) source sizes.
        resized_sizes: (B, 2) sizes after the resize.
        offsets: (B, 2) the crop's offset in the resized image.
        crop_px: side of the crop.
        mirror: (B,) reflect horizontally, or None.
    """
    scale = sizes / resized_sizes
    low, high = offsets * scale, (offsets + crop_px) * scale
    # The triangular filter reaches `scale` pixels when shrinking and one when enlarging.
    margin = np.ceil(scale).astype(np.int64) + 2
    anchor = np.maximum(np.floor(low).astype(np.int64) - margin, 0)
    stop = np.minimum(np.ceil(high).astype(np.int64) + margin, sizes)
    start, end = low - anchor, high - anchor
    if mirror is not None:
        start[:, 1], end[:, 1] = np.where(mirror, end[:, 1], start[:, 1]), np.where(mirror, start[:, 1], end[:, 1])
    return Regions(anchor.astype(np.int32), (stop - anchor).astype(np.int32), start.astype(np.float32), end.astype(np.float32))
