"""Finished images on a GPU in one pass, as a Triton kernel: gather, crop, YCbCr to RGB, flip, minus the mean, plus the shift.

A program makes some lines of one image, all three channels. Integers as in `pipeline.resident.yuv420`, floats in the order of
`Normalizer`: the bits of `DeviceNormalizer`'s torch path. Importing this module raises ImportError where Triton is missing.
B samples, S side of a square, c of a crop, s and k of the chroma of either, in pixels."""
# Triton's language is typed when it compiles, and Triton need not be here.
# mypy: disable-error-code="assignment, import-not-found, import-untyped, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipeline.resident.store import Planes

PIXELS = 1024  # of a program


@triton.jit
def _images(light: tl.tensor, chroma: tl.tensor, table: tl.tensor, mean: tl.tensor, out: tl.tensor, B: tl.tensor,
            light_image: tl.tensor, light_plane: tl.tensor, light_line: tl.tensor, chroma_image: tl.tensor,
            chroma_plane: tl.tensor, chroma_line: tl.tensor, out_image: tl.tensor, out_plane: tl.tensor, out_line: tl.tensor,
            out_column: tl.tensor, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr, YUV: tl.constexpr, PACKED: tl.constexpr,
            MEAN: tl.constexpr, CENTERED: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """`table` (7, B) int32: which of the planes, top, left, mirror, and the bits of the three shifts."""
    image = tl.program_id(0)
    which = tl.load(table + image).to(tl.int64)
    top, left, mirror = tl.load(table + B + image), tl.load(table + 2 * B + image), tl.load(table + 3 * B + image)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (line < C) & (column < C)
    source = tl.where(mirror != 0, C - 1 - column, column)  # of the crop
    down, across = top + line, left + source  # in the square
    pixel = light + which * light_image + line * light_line + source
    if not PACKED:
        pixel += top * light_line + left
    if YUV:
        edge: tl.constexpr = (S + 1) // 2 - 1
        first_line, first_column = 0, 0
        if PACKED:
            first_line = tl.minimum(tl.maximum(top // 2 - 1, 0), edge + 1 - K)
            first_column = tl.minimum(tl.maximum(left // 2 - 1, 0), edge + 1 - K)
        far_line = tl.minimum(tl.maximum(down // 2 + down % 2 * 2 - 1, 0), edge) - first_line
        far_column = tl.minimum(tl.maximum(across // 2 + across % 2 * 2 - 1, 0), edge) - first_column
        near_line, near_column = down // 2 - first_line, across // 2 - first_column
        first = chroma + which * chroma_image
        near, far = first + near_line * chroma_line, first + far_line * chroma_line
        blues, reds = (), ()
        pointers = (near + near_column, near + far_column, far + near_column, far + far_column)
        for k in tl.static_range(4):
            blues = blues + (tl.load(pointers[k], mask=inside, other=128).to(tl.int32) - 128,)
            reds = reds + (tl.load(pointers[k] + chroma_plane, mask=inside, other=128).to(tl.int32) - 128,)
        y = tl.load(pixel, mask=inside, other=0).to(tl.int32)
    for channel in tl.static_range(3):
        if YUV:
            of_blue = 0 if channel == 0 else -22554 if channel == 1 else 116130
            of_red = 91881 if channel == 0 else -46802 if channel == 1 else 0
            added = 64 + 9 * ((blues[0] * of_blue + reds[0] * of_red + 4096) >> 13)
            added += 3 * ((blues[1] * of_blue + reds[1] * of_red + 4096) >> 13)
            added += 3 * ((blues[2] * of_blue + reds[2] * of_red + 4096) >> 13)
            added += (blues[3] * of_blue + reds[3] * of_red + 4096) >> 13
            value = tl.minimum(tl.maximum(y + (added >> 7), 0), 255).to(tl.float32)
        else:
            value = tl.load(pixel + channel * light_plane, mask=inside, other=0).to(tl.float32)
        if MEAN and CENTERED:
            value -= tl.load(mean + (channel * C + line) * C + column, mask=inside, other=0.0)
        elif MEAN:
            value -= tl.load(mean + (channel * S + down) * S + across, mask=inside, other=0.0)
        value += tl.load(table + (4 + channel) * B + image).to(tl.float32, bitcast=True)
        place = out + image.to(tl.int64) * out_image + channel * out_plane + line * out_line + column * out_column
        tl.store(place, value.to(out.dtype.element_ty), mask=inside)


def images(planes: Planes, table: torch.Tensor, mean: torch.Tensor | None, out: torch.Tensor, square_px: int, *,
           centered: bool) -> None:
    """Fill `out` (B, 3, c, c), float32, bfloat16 or float16, of any strides, from squares or packed crops; on the current stream
    of its device. `table` (7, B) int32: see above; `mean` (3, S, S) or, `centered`, (3, c, c) float32."""
    light, chroma = planes
    count, crop = len(out), out.shape[-1]
    strides = chroma.stride()[:3] if chroma is not None else (0, 0, 0)
    width = triton.next_power_of_2(crop)
    lines = max(1, min(width, PIXELS // width))
    with torch.cuda.device_of(out):
        _images[(count, triton.cdiv(crop, lines))](
            light, light if chroma is None else chroma, table, light if mean is None else mean, out, count, *light.stride()[:3],
            *strides, *out.stride(), S=square_px, C=crop, K=0 if chroma is None else chroma.shape[-1], YUV=chroma is not None,
            PACKED=light.shape[-1] == crop != square_px, MEAN=mean is not None, CENTERED=centered, LINES=lines,
            WIDTH=width, num_warps=4)
