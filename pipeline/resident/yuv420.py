"""Chroma subsampling, YCbCr 4:2:0, as in JPEG: RGB squares to planes at half the bytes, and back. Integers only.

The colour space is JFIF's (full-range BT.601). Each chroma value is that of the mean of 2×2 pixels; the way back is the triangle
filter of libjpeg's "fancy upsampling" (weights 9, 3, 3, 1 of 16), so a crop needs one chroma value more on each side. All
arithmetic is on whole numbers of fixed rounding: the same bits on every device, and for a crop alone as for the crop of a whole
square. The functions take NumPy arrays (on a CPU: no threads of their own) and torch tensors (on a GPU) alike.

Against the RGB squares, 256 px, of 300 ImageNet photographs: mean difference 1.23 grey levels, 95% within 5, 99% within 11,
the largest 168 (fine red or blue detail); PSNR 42.9 dB (mean), 24.6 (worst); six of
them, grey ones, are exact. B samples (any number of leading axes), S side
of a square, s = ⌈S/2⌉ side of its chroma planes, h and w sides of a crop."""
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = TypeVar("Pixels", npt.NDArray[Any], Tensor)

# 16 fraction bits; the weights of Y add up to 65536. Chroma, of a sum of four pixels, has 18; a bias of one less than half keeps
# 255.5 from becoming 256.
_Y = (19595, 38470, 7471)
_CB, _CR = (-11059, -21709, 32768), (32768, -27439, -5329)
_CHROMA_BIAS = (128 << 18) + (1 << 17) - 1
# What chroma adds to R, G, B, with 16 fraction bits, of (Cb - 128, Cr - 128).
_ADDS = ((0, 91881), (-22554, -46802), (116130, 0))
_KEPT = 3  # fraction bits of that while it is upsampled: 16 · 8 · 227 + 64 still is an int16


def row_bytes(square_px: int) -> int:
    """Bytes of a square: S² of Y, s² of Cb, s² of Cr, in this order."""
    return square_px ** 2 + 2 * ((square_px + 1) // 2) ** 2


def planes(rows: Pixels, square_px: int) -> tuple[Pixels, Pixels]:
    """Views of rows (…, row_bytes) uint8: Y (…, S, S) and chroma (…, 2, s, s)."""
    s = (square_px + 1) // 2
    lead: tuple[int, ...] = rows.shape[:-1]
    return (rows[..., :square_px ** 2].reshape(*lead, square_px, square_px), rows[..., square_px ** 2:].reshape(*lead, 2, s, s))


def encode(squares: Pixels) -> Pixels:
    """RGB squares (…, 3, S, S) uint8 → rows (…, row_bytes) uint8. An odd last row or column counts twice in its mean."""
    size = squares.shape[-1]
    s, half = (size + 1) // 2, size // 2
    lead: tuple[int, ...] = squares.shape[:-3]
    rows = _empty(squares, (*lead, row_bytes(size)), "uint8")
    wide = _cast(squares, "int32")
    rows[..., :size ** 2] = _weighted(wide, _Y, 1 << 15, 16).reshape(*lead, size ** 2)
    lines = _cast(wide[..., 0::2, :], "int32")
    lines[..., :half, :] += wide[..., 1::2, :]
    lines[..., half:, :] *= 2
    fours = _cast(lines[..., 0::2], "int32")
    fours[..., :half] += lines[..., 1::2]
    fours[..., half:] *= 2
    for plane, weights in enumerate((_CB, _CR)):
        first = size ** 2 + plane * s ** 2
        rows[..., first:first + s ** 2] = _weighted(fours, weights, _CHROMA_BIAS, 18).reshape(*lead, s ** 2)
    return rows


def _weighted(pixels: Pixels, weights: tuple[int, int, int], bias: int, bits: int) -> Pixels:
    total = pixels[..., 0, :, :] * weights[0]
    total += pixels[..., 1, :, :] * weights[1]
    total += pixels[..., 2, :, :] * weights[2]
    total += bias
    total >>= bits
    return total


def crop(rows: Pixels, square_px: int, top: int, left: int, crop_px: int) -> Pixels:
    """Rows (…, row_bytes) uint8 → RGB (…, 3, crop, crop) uint8: bit for bit a piece of the whole square's, S at (0, 0)."""
    y, chroma = planes(rows, square_px)
    down, right = top % 2, left % 2
    added = addends(window(chroma, top, left, crop_px))[..., down:down + crop_px, right:right + crop_px]
    return merge(y[..., top:top + crop_px, left:left + crop_px], added)


def window(chroma: Pixels, top: int, left: int, crop_px: int) -> Pixels:
    """The chroma (…, 2, w, w) that the crop at (top, left) needs, of (…, 2, s, s): w = crop // 2 + 3, whatever the place. The
    outermost values are repeated beyond the edge."""
    s, size, first, second = chroma.shape[-1], crop_px // 2 + 3, top // 2 - 1, left // 2 - 1
    if min(first, second) >= 0 and max(first, second) + size <= s:
        return chroma[..., first:first + size, second:second + size]
    down, across = (np.arange(low, low + size).clip(0, s - 1) for low in (first, second))
    return chroma[..., down, :][..., across]


def kept_px(square_px: int, crop_px: int) -> int:
    """Side of the piece of a square's chroma that holds whatever a crop of this side needs, without what lies beyond the edge."""
    return min(crop_px // 2 + 3, (square_px + 1) // 2)


def kept_from(place: Tensor, square_px: int, crop_px: int) -> Tensor:
    """Where that piece begins, (B,), of crops at `place` (B,), tops or lefts."""
    return (place // 2 - 1).clamp(0, (square_px + 1) // 2 - kept_px(square_px, crop_px))


def windows(kept: Tensor, top: Tensor, left: Tensor, square_px: int, crop_px: int) -> Tensor:
    """`window` of many crops: (B, 2, w, w) of their kept pieces (B, 2, k, k)."""
    span, edge = torch.arange(crop_px // 2 + 3, device=kept.device), (square_px + 1) // 2 - 1
    down, across = ((place[:, None] // 2 - 1 + span).clamp_(0, edge) - kept_from(place, square_px, crop_px)[:, None]
                    for place in (top, left))
    image, plane = (torch.arange(count, device=kept.device) for count in kept.shape[:2])
    return kept[image[:, None, None, None], plane[:, None, None], down[:, None, :, None], across[:, None, None, :]]


def addends(around: Pixels) -> Pixels:
    """What chroma adds to Y at full size: windows (…, 2, n + 2, m + 2) uint8 (one value more on each side than the 2n × 2m
    pixels need) → (…, 3, 2n, 2m) int16."""
    wide = _cast(around, "int32")
    wide -= 128
    blue, red = wide[..., 0, :, :], wide[..., 1, :, :]
    height, width = around.shape[-2:]
    low = _empty(around, (*around.shape[:-3], 3, height, width), "int16")
    shift = 16 - _KEPT
    for channel, (of_blue, of_red) in enumerate(_ADDS):
        exact = red * of_red if not of_blue else blue * of_blue
        if of_blue and of_red:
            exact += red * of_red
        exact += 1 << (shift - 1)
        exact >>= shift
        low[..., channel, :, :] = exact
    low += 1 << (_KEPT - 1)  # half a grey level, 16-fold after the filter: the rounding of the last shift
    near = low * 3
    across = _interleaved(near[..., 1:-1] + low[..., :-2], near[..., 1:-1] + low[..., 2:])
    near = across * 3
    added = _empty(around, (*around.shape[:-3], 3, 2 * (height - 2), 2 * (width - 2)), "int16")
    added[..., 0::2, :] = near[..., 1:-1, :]
    added[..., 0::2, :] += across[..., :-2, :]
    added[..., 1::2, :] = near[..., 1:-1, :]
    added[..., 1::2, :] += across[..., 2:, :]
    added >>= 4 + _KEPT
    return added


def _interleaved(even: Pixels, odd: Pixels) -> Pixels:
    """Columns in turn: (…, m) int16 twice → (…, 2m) int16. As pairs in an int32: no library is fast at every second value."""
    pairs = _cast(odd, "int32")
    pairs <<= 16
    low = _cast(even, "int32")
    low &= 0xFFFF
    pairs |= low
    return pairs.view(torch.int16) if isinstance(pairs, Tensor) else pairs.view(np.int16)


def merge(y: Pixels, added: Pixels) -> Pixels:
    """Y (…, h, w) uint8 and what chroma adds (…, 3, h, w) int16 → RGB (…, 3, h, w) uint8, clamped to 0…255."""
    return _cast((_cast(y, "int16")[..., None, :, :] + added).clip(0, 255), "uint8")


def _cast(pixels: Pixels, kind: str) -> Pixels:
    if isinstance(pixels, Tensor):
        return pixels.to(getattr(torch, kind), copy=True)
    return pixels.astype(kind)


def _empty(like: Pixels, shape: tuple[int, ...], kind: str) -> Pixels:
    if isinstance(like, Tensor):
        return like.new_empty(shape, dtype=getattr(torch, kind))
    return np.empty(shape, kind)
