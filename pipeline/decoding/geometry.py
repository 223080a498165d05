"""Crop and resize geometry: which region of the source image must be decoded for a crop, in NumPy; nothing is cut here.

Resizing the whole image and cropping it reads, for a crop at (y, x) of the resized image, the source rectangle [y, y+crop)·H/h
× [x, x+crop)·W/w. Decoding just that rectangle plus the filter's margin and resampling it *at those continuous coordinates*
gives the same pixels for less work (stretching the rounded rectangle instead is wrong by up to 193 grey levels). So on GPUs;
on CPUs all from the image's corner to that rectangle's end is decoded, see `pipeline.decoding.resize`. B samples; H, W source
size; h, w size after the resize; all pairs are (rows, columns)."""
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.index.sample_index import SampleIndex

Pairs = npt.NDArray[np.int64]
_EXACT_BITS = 23  # of a float32 coordinate, before and after the binary point together


@dataclass(frozen=True)
class Regions:
    """What to decode of each image and where to sample it."""
    anchor: npt.NDArray[np.int32]  # (B, 2) first source pixel to decode
    shape: npt.NDArray[np.int32]  # (B, 2) source pixels to decode
    start: npt.NDArray[np.float32]  # (B, 2) corner of the crop in continuous coordinates of the decoded rectangle
    end: npt.NDArray[np.float32]  # (B, 2) its other corner
    scale: npt.NDArray[np.float64]  # (B, 2) source pixels for one of the resized image
    offset: Pairs  # (B, 2) the crop's offset in the resized image
    boxed: bool = False  # what is to be decoded is a box that becomes the crop; its surroundings do not count

    @property
    def first(self) -> npt.NDArray[np.int32]:
        """(B, 2) first source pixel that is decoded for a CPU's resize: the image's corner, or a box's."""
        return self.anchor if self.boxed else np.zeros_like(self.anchor)

    @property
    def reach(self) -> npt.NDArray[np.int32]:
        """(B, 2) source pixels from there to the end of the region."""
        return self.anchor + self.shape - self.first

    def rows(self, rows: slice | list[int]) -> "Regions":
        return Regions(self.anchor[rows], self.shape[rows], self.start[rows], self.end[rows], self.scale[rows], self.offset[rows],
                       self.boxed)


def sizes(index: SampleIndex, ids: npt.NDArray[np.int64]) -> Pairs:
    """(B, 2) source sizes of samples (B,)."""
    rows = index.samples[ids]
    return np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)


def resized(source: Pairs, short_px: int) -> Pairs:
    """(B, 2) size after resizing the short side to `short_px`; the long side is rounded half up to a whole pixel."""
    short = source.min(axis=1, keepdims=True)
    return (2 * source * short_px + short) // (2 * short)


def central(resized_sizes: Pairs, side_px: int) -> Pairs:
    """(B, 2) offset of the central square of side `side_px` (paper §2); an odd pixel too many goes below and right."""
    return (resized_sizes - side_px) // 2


def regions(source: Pairs, resized_sizes: Pairs, offsets: Pairs, crop_px: int) -> Regions:
    """Source regions of square crops, of side `crop_px` at `offsets` (B, 2) in images of sizes `source`, resized to
    `resized_sizes`.

    The scale is rounded to a multiple of 2^-14 (for short sides of 257 to 512; half as fine for an image twice as large),
    which moves no sample by more than 1/128 of a source pixel. Then every coordinate is exact in float32, and a crop's pixels
    are those of the whole square at its place but for one in a million, by one grey level; without it 110 in a million differ."""
    grid = 2.0 ** (_EXACT_BITS - np.ceil(np.log2(source.min(axis=1, keepdims=True))))
    scale = np.round(source / resized_sizes * grid) / grid
    first = np.round((source - scale * resized_sizes) / 2 * grid) / grid  # what the rounding leaves over, on both sides alike
    low, high = first + offsets * scale, first + (offsets + crop_px) * scale
    # The triangular filter reaches `scale` pixels when shrinking and one when enlarging; nowhere when there is nothing to do.
    margin = np.where(source == resized_sizes, 0, np.ceil(scale).astype(np.int64) + 2)
    anchor = np.maximum(np.floor(low).astype(np.int64) - margin, 0)
    stop = np.minimum(np.ceil(high).astype(np.int64) + margin, source)
    return Regions(anchor.astype(np.int32), (stop - anchor).astype(np.int32), (low - anchor).astype(np.float32),
                   (high - anchor).astype(np.float32), source / resized_sizes, offsets)


def boxes(source: Pairs, resized_sizes: Pairs, offsets: Pairs, box_sizes: Pairs, crop_px: int) -> Regions:
    """Source regions of boxes of `box_sizes` (B, 2) at `offsets` (B, 2) in images of sizes `source`, resized to `resized_sizes`;
    each is rounded to whole source pixels and resized to (`crop_px`, `crop_px`) as if it were an image of its own, as torchvision
    does."""
    scale = source / resized_sizes
    low = np.clip(np.rint(offsets * scale).astype(np.int64), 0, source - 1)
    high = np.clip(np.rint((offsets + box_sizes) * scale).astype(np.int64), low + 1, source)
    shape, zeros = high - low, np.zeros_like(low)
    return Regions(low.astype(np.int32), shape.astype(np.int32), zeros.astype(np.float32), shape.astype(np.float32),
                   shape / crop_px, zeros, True)
