"""ReLU, LRN and max pooling in one Triton kernel each way, in channels_last; the place of each window's maximum is kept, a byte.

Forward: a lane is C adjacent channels (model/kernels/lrn.py) of J pooled pixels in a row, and goes down the image, `rows` pooled
pixels far. It keeps the largest so far of the windows that it is in; so rows of pixels are normalised once, and of their columns
those that the next lane's windows have too twice. Values are compared as they are computed and rounded when they are stored: what
is stored is what the two kernels give one after the other, bit for bit.

Backward: a lane is C channels of STRIDE × STRIDE pixels, those that begin where a window begins: each of the windows that reach
them is loaded once. It sums, in the order of the windows, the gradients of those whose maximum a pixel was, then
goes through LRN.

A place is row · PX + column in the window. As torch has it, the first of equal maxima is taken, and the last NaN. H × W pixels
become P × Q pooled ones."""
# Triton's language is typed when it compiles: a tuple grows in an unrolled loop. And Triton need not be here.
# mypy: disable-error-code="assignment, import-not-found, import-untyped, var-annotated"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from model.config import LrnConfig, PoolConfig
from model.kernels import lrn
from model.kernels.lrn import LANES, columns_within, gradient, load, normalised, store, tile_of, tiles

ROWS = 8     # of pooled pixels that a lane goes down, at most
LARGEST = 4  # window and stride: loops over them are unrolled


@triton.jit
def _larger(most: tl.tensor, place: tl.tensor, y: tl.tensor, other: tl.tensor) -> tl.tuple:
    taken = (y > most) | (y != y)
    return tl.where(taken, y, most), tl.where(taken, other, place)


@triton.jit
def _row(x_ptr: tl.tensor, place: tl.tuple, columns: tl.tensor, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
         WINDOW: tl.constexpr, RELU: tl.constexpr, FLOAT: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr, C: tl.constexpr,
         L: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr, J: tl.constexpr) -> tl.tuple:
    """The largest y of a row of pixels in each of J windows, and its column. `place`: of the first pixel; `columns`: (L), from
    there to the end of the row."""
    offset, channel, there = place
    ys, most, found = (), (), ()
    for w in tl.static_range((J - 1) * STRIDE + PX):
        x = load(x_ptr, (offset + w * ALL, channel, there & (w < columns)), 1, WINDOW // 2, RELU, FLOAT, N, C, L, True)
        ys = ys + (tile_of(normalised(x, K, ALPHA, BETA, WINDOW, C), L, C),)
    for j in tl.static_range(J):
        y, at = ys[j * STRIDE], tl.zeros([L, C], tl.int32)
        for k in tl.static_range(1, PX):
            y, at = _larger(y, at, ys[j * STRIDE + k], k)
        most, found = most + (y,), found + (at,)
    return most, found


@triton.jit
def _forward(x_ptr: tl.tensor, y_ptr: tl.tensor, k_ptr: tl.tensor, lanes: tl.tensor, h: tl.tensor, w: tl.tensor, p: tl.tensor,
             q: tl.tensor, rows: tl.tensor, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, WINDOW: tl.constexpr,
             RELU: tl.constexpr, FLOAT: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
             PX: tl.constexpr, STRIDE: tl.constexpr, J: tl.constexpr) -> None:
    before: tl.constexpr = (PX - 1) // STRIDE  # windows begun above
    lane = tl.program_id(0) * L + tl.arange(0, L)
    block, spans, strips = lane % (ALL // C), tl.cdiv(q, J), tl.cdiv(p, rows)
    column = lane // (ALL // C) % spans * J
    strip = lane // (ALL // C) // spans
    row, image = strip % strips * rows, (strip // strips).to(tl.int64)
    first, channel = (image * h * w + column * STRIDE) * ALL + block * C, block * C % N
    most, places = (), ()
    for _ in tl.static_range(before * J):
        most, places = most + (tl.full([L, C], float("-inf"), FLOAT),), places + (tl.zeros([L, C], tl.int32),)
    for i in range(rows + before):
        ys, ats = (), ()  # a row of windows of each age
        for a in tl.static_range(min(STRIDE, PX)):
            place = (first + ((row + i) * STRIDE + a) * w * ALL, channel, (lane < lanes) & ((row + i) * STRIDE + a < h))
            y, at = _row(x_ptr, place, w - column * STRIDE, K, ALPHA, BETA, WINDOW, RELU, FLOAT, N, ALL, C, L, PX, STRIDE, J)
            ys, ats = ys + y, ats + at
        kept, kept_places = (), ()
        for age in tl.static_range(before + 1):
            for j in tl.static_range(J):
                if age > 0:
                    y, at = most[(age - 1) * J + j], places[(age - 1) * J + j]
                    y, at = _larger(y, at, ys[j], ats[j] + age * STRIDE * PX)
                else:
                    y, at = ys[j], ats[j]
                for a in tl.static_range(1, min(STRIDE, PX)):
                    if age * STRIDE + a < PX:
                        y, at = _larger(y, at, ys[a * J + j], ats[a * J + j] + (age * STRIDE + a) * PX)
                kept, kept_places = kept + (y,), kept_places + (at,)
        for j in tl.static_range(J):
            target = ((image * p + row + i - before) * q + column + j) * ALL + block * C
            inside = (lane < lanes) & (i >= before) & (row + i - before < p) & (column + j < q)
            where = target[:, None] + tl.arange(0, C)[None, :]
            tl.store(y_ptr + where, kept[before * J + j].to(y_ptr.dtype.element_ty), mask=inside[:, None])
            tl.store(k_ptr + where, kept_places[before * J + j].to(tl.uint8), mask=inside[:, None])
        most, places = (), ()
        for n in tl.static_range(before * J):
            most, places = most + (kept[n],), places + (kept_places[n],)


@triton.jit
def _backward(x_ptr: tl.tensor, g_ptr: tl.tensor, k_ptr: tl.tensor, dx_ptr: tl.tensor, lanes: tl.tensor, h: tl.tensor,
              w: tl.tensor, p: tl.tensor, q: tl.tensor, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
              WINDOW: tl.constexpr, RELU: tl.constexpr, FLOAT: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
              C: tl.constexpr, L: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr) -> None:
    half: tl.constexpr = WINDOW // 2
    sides: tl.constexpr = 2 * ((half + C - 1) // C) + 1
    before: tl.constexpr = (PX - 1) // STRIDE  # windows that begin before these pixels and reach them, in rows and in columns
    lane = tl.program_id(0) * L + tl.arange(0, L)
    block, across, down = lane % (ALL // C), tl.cdiv(w, STRIDE), tl.cdiv(h, STRIDE)
    column = lane // (ALL // C) % across
    strip = lane // (ALL // C) // across
    row, image = strip % down, (strip // down).to(tl.int64)
    channel = block * C % N
    grads, places = (), ()
    for r in tl.static_range(before + 1):
        for c in tl.static_range(before + 1):
            i, j = row - before + r, column - before + c
            there = (lane < lanes) & (i >= 0) & (i < p) & (j >= 0) & (j < q)
            place = (((image * p + i) * q + j) * ALL + block * C, channel, there)
            grads = grads + tiles(g_ptr, place, half, N, C)
            places = places + tiles(k_ptr, place, half, N, C)
    for a in tl.static_range(STRIDE):
        for b in tl.static_range(STRIDE):
            chosen = ()
            for side in tl.static_range(sides):
                total = tl.zeros([L, C], FLOAT)
                for r in tl.static_range(before + 1):
                    for c in tl.static_range(before + 1):
                        if b + (before - c) * STRIDE < PX:
                            own = (a + (before - r) * STRIDE) * PX + b + (before - c) * STRIDE  # its place in that window
                            chose = places[(r * (before + 1) + c) * sides + side] == own
                            total += tl.where(chose, grads[(r * (before + 1) + c) * sides + side].to(FLOAT), 0.0)
                chosen = chosen + (total,)
            i, j = row * STRIDE + a, column * STRIDE + b
            place = (((image * h + i) * w + j) * ALL + block * C, channel, (lane < lanes) & (i < h) & (j < w))
            x = load(x_ptr, place, 1, 2 * half, RELU, FLOAT, N, C, L, True)
            g = columns_within(chosen, half, FLOAT, C, L)
            store(dx_ptr, gradient(x, g, K, ALPHA, BETA, WINDOW, RELU, C), place, 1, N, C, L, True)


def takes(x: torch.Tensor, config: LrnConfig, pool: PoolConfig) -> bool:
    """Whether the kernels are made for this input: its type and memory format, and the windows."""
    return (lrn.takes(x, config) and max(pool.px, pool.stride) <= LARGEST and min(x.shape[2:]) >= pool.px
            and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())


def forward(x: torch.Tensor, y: torch.Tensor, places: torch.Tensor, config: LrnConfig, pool: PoolConfig, groups: int,
            relu: bool) -> None:
    """Normalise and pool x (B, C, H, W) into y (B, C, P, Q) and `places`, of its shape, uint8; on the current stream."""
    rows = triton.cdiv(y.shape[2], triton.cdiv(y.shape[2], ROWS))
    along = 2 if pool.px > pool.stride else 1  # windows that overlap share columns
    tasks = triton.cdiv(y.shape[2], rows) * triton.cdiv(y.shape[3], along)
    _launch(_forward, (x, y, places), x, y, tasks, config, pool, groups, relu, rows=rows, J=along)


def backward(x: torch.Tensor, grad: torch.Tensor, places: torch.Tensor, result: torch.Tensor, config: LrnConfig,
             pool: PoolConfig, groups: int, relu: bool) -> None:
    """The gradient by x, given that by y (`grad`), into `result`; shapes and formats as in `forward`."""
    tasks = triton.cdiv(x.shape[2], pool.stride) * triton.cdiv(x.shape[3], pool.stride)
    _launch(_backward, (x, grad, places, result), x, grad, tasks, config, pool, groups, relu)


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor, tasks: int, config: LrnConfig,
            pool: PoolConfig, groups: int, relu: bool, **more: int) -> None:
    """`tasks`: of a lane, in an image."""
    images, channels, h, w = x.shape
    n = channels // groups
    block = math.gcd(n, 16 // x.element_size())
    lanes = images * tasks * (channels // block)
    with torch.cuda.device_of(x):  # without effect on a CPU, in the interpreter
        kernel[(triton.cdiv(lanes, LANES),)](
            *tensors, lanes, h, w, *y.shape[2:], K=config.k, ALPHA=config.alpha, BETA=config.beta, WINDOW=config.n, RELU=relu,
            FLOAT=tl.float64 if x.dtype == torch.float64 else tl.float32, N=n, ALL=channels, C=block, L=LANES, PX=pool.px,
            STRIDE=pool.stride, num_warps=LANES // 32, **more)
