"""Local response normalisation for GPUs: one Triton kernel forward and one backward, each one pass over DRAM.

A lane is C adjacent channels of one pixel. It loads them and the channels around them that their windows reach, and works in
registers: a value that several windows share is loaded once a lane, and from L1 or L2 by the next lane. Channels of other groups,
and beyond the ends, count as 0, which clips the windows. How lanes meet memory depends on the shift S between channels:

  S > 1, NCHW           a program is L pixels of one block of channels; channel by channel, its lanes load neighbours;
  S = 1, channels_last  a program is L lanes in a row; each loads C channels at once, 16 bytes: rows of an (L, C) tile.

M maps, N channels of one group, S shift (model/lrn.py); C channels of a lane, L lanes of a program; h = n // 2. The `reach` of
a load is how many channels it takes on each side of the C."""
# Triton's language is typed when it compiles: a tuple grows in an unrolled loop. And Triton need not be here.
# mypy: disable-error-code="assignment, import-not-found, import-untyped"
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from model.config import LrnConfig

LANES = 128    # of a program: one a thread
CHANNELS = 16  # of a lane in NCHW. Backward with n = 5 it loads 24 of x and 20 of the gradient for them
WIDEST = 31    # window: loops over it are unrolled
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@triton.jit
def _place(lanes: tl.tensor, shift: tl.tensor, N: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
           LAST: tl.constexpr) -> tl.tuple:
    """For the lanes (L) of this program: where their first channel lies, which it is, and which lanes there are."""
    program = tl.program_id(0)
    if LAST:
        lane = program.to(tl.int64) * L + tl.arange(0, L)
        return lane * C, (lane % (N // C)).to(tl.int32) * C, lane < lanes
    else:
        blocks: tl.constexpr = (N + C - 1) // C
        spans = tl.cdiv(shift, L)
        block = program // spans
        channel = (block % blocks) * C
        pixel = (program % spans) * L + tl.arange(0, L)
        row = (block // blocks).to(tl.int64) * N + channel
        return row * shift + pixel, channel, pixel < shift


@triton.jit
def _columns(tile: tl.tensor, L: tl.constexpr, C: tl.constexpr) -> tl.tuple:
    """(L, C) → its C columns (L). C is a power of 2; a thread has its whole row, so nothing moves between threads."""
    if C == 1:
        return (tl.reshape(tile, [L]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [L, C // 2, 2]))
        evens, odds = _columns(even, L, C // 2), _columns(odd, L, C // 2)
        columns = ()
        for c in tl.static_range(C // 2):
            columns = columns + (evens[c], odds[c])
        return columns


@triton.jit
def tile_of(columns: tl.tuple, L: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """C columns (L) → (L, C): the inverse of `_columns`."""
    if C == 1:
        return tl.reshape(columns[0], [L, 1])
    else:
        evens, odds = (), ()
        for c in tl.static_range(C // 2):
            evens = evens + (columns[2 * c],)
            odds = odds + (columns[2 * c + 1],)
        return tl.reshape(tl.join(tile_of(evens, L, C // 2), tile_of(odds, L, C // 2)), [L, C])


@triton.jit
def tiles(source: tl.tensor, place: tl.tuple, REACH: tl.constexpr, N: tl.constexpr, C: tl.constexpr) -> tl.tuple:
    """Where channels are adjacent: those of each lane, (L, C), between those before and after it, as far as `REACH` goes."""
    offset, channel, there = place
    sides: tl.constexpr = (REACH + C - 1) // C
    found = ()
    for side in tl.static_range(-sides, sides + 1):
        # N is a multiple of C: a tile is all inside or all outside.
        inside = there & (channel + side * C >= 0) & (channel + side * C < N)
        where = (offset + side * C)[:, None] + tl.arange(0, C)[None, :]
        found = found + (tl.load(source + where, mask=inside[:, None], other=0.0),)
    return found


@triton.jit
def columns_within(found: tl.tuple, REACH: tl.constexpr, FLOAT: tl.constexpr, C: tl.constexpr, L: tl.constexpr) -> tl.tuple:
    """Channels -REACH .. C + REACH - 1 of `tiles`."""
    sides: tl.constexpr = (REACH + C - 1) // C
    values = ()
    for side in tl.static_range(-sides, sides + 1):
        columns = _columns(found[side + sides], L, C)
        for c in tl.static_range(C):
            if side * C + c >= -REACH and side * C + c < C + REACH:
                values = values + (columns[c].to(FLOAT),)
    return values


@triton.jit
def load(source: tl.tensor, place: tl.tuple, shift: tl.tensor, REACH: tl.constexpr, RELU: tl.constexpr, FLOAT: tl.constexpr,
         N: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr) -> tl.tuple:
    """Channels -REACH .. C + REACH - 1 of each lane: a tuple of C + 2·REACH values (L), 0 where there is no channel."""
    if LAST:
        values = columns_within(tiles(source, place, REACH, N, C), REACH, FLOAT, C, L)
    else:
        offset, channel, there = place
        values = ()
        for c in tl.static_range(-REACH, C + REACH):
            inside = there & (channel + c >= 0) & (channel + c < N)
            values = values + (tl.load(source + (offset + c * shift.to(tl.int64)), mask=inside, other=0.0).to(FLOAT),)
    if RELU:
        rectified = ()
        for c in tl.static_range(C + 2 * REACH):
            rectified = rectified + (tl.maximum(values[c], 0.0, propagate_nan=tl.PropagateNan.ALL),)
        return rectified
    else:
        return values


@triton.jit
def store(target: tl.tensor, values: tl.tuple, place: tl.tuple, shift: tl.tensor,
          N: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr) -> None:
    """The C values of each lane."""
    offset, channel, there = place
    if LAST:
        narrow = ()
        for c in tl.static_range(C):
            narrow = narrow + (values[c].to(target.dtype.element_ty),)
        tl.store(target + (offset[:, None] + tl.arange(0, C)[None, :]), tile_of(narrow, L, C), mask=there[:, None])
    else:
        for c in tl.static_range(C):
            tl.store(target + (offset + c * shift.to(tl.int64)), values[c].to(target.dtype.element_ty),
                     mask=there & (channel + c < N))


@triton.jit
def _window_sums(values: tl.tuple, COUNT: tl.constexpr, WINDOW: tl.constexpr) -> tl.tuple:
    """COUNT sums of WINDOW adjacent values: the first is that of the first WINDOW."""
    sums = ()
    for c in tl.static_range(COUNT):
        total = values[c]
        for j in tl.static_range(1, WINDOW):
            total = total + values[c + j]
        sums = sums + (total,)
    return sums


@triton.jit
def _powers(x: tl.tuple, COUNT: tl.constexpr, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
            WINDOW: tl.constexpr) -> tl.tuple:
    """s^-beta and 1/s for the COUNT windows over x, COUNT + WINDOW - 1 (rectified) channels."""
    squares = ()
    for c in tl.static_range(COUNT + WINDOW - 1):
        squares = squares + (x[c] * x[c],)
    sums = _window_sums(squares, COUNT, WINDOW)
    powers, inverses = (), ()
    for c in tl.static_range(COUNT):
        s = K + ALPHA * sums[c]
        if BETA == 0.75:
            root = tl.rsqrt(s)
            powers = powers + (root * tl.sqrt(root),)
            inverses = inverses + (root * root,)
        else:
            powers = powers + (tl.exp(-BETA * tl.log(s)),)
            inverses = inverses + (1.0 / s,)
    return powers, inverses


@triton.jit
def normalised(x: tl.tuple, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, WINDOW: tl.constexpr,
               C: tl.constexpr) -> tl.tuple:
    """C channels of the result, given the (rectified) input from channel -h."""
    powers, _ = _powers(x, C, K, ALPHA, BETA, WINDOW)
    y = ()
    for c in tl.static_range(C):
        y = y + (x[c + WINDOW // 2] * powers[c],)
    return y


@triton.jit
def gradient(x: tl.tuple, g: tl.tuple, K: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, WINDOW: tl.constexpr,
             RELU: tl.constexpr, C: tl.constexpr) -> tl.tuple:
    """C channels of the gradient by the input, given the (rectified) input from channel -2h, and from -h the gradient by the
    result, g."""
    half: tl.constexpr = WINDOW // 2
    powers, inverses = _powers(x, C + 2 * half, K, ALPHA, BETA, WINDOW)  # from channel -h
    scaled, terms = (), ()
    for c in tl.static_range(C + 2 * half):
        scaled = scaled + (g[c] * powers[c],)
        terms = terms + (scaled[c] * inverses[c] * x[c + half],)
    sums = _window_sums(terms, C, WINDOW)
    dx = ()
    for c in tl.static_range(C):
        slope = scaled[c + half] - 2.0 * ALPHA * BETA * x[c + 2 * half] * sums[c]
        if RELU:
            slope = tl.where(x[c + 2 * half] <= 0.0, 0.0, slope)  # NaN passes, as torch's ReLU lets it
        dx = dx + (slope,)
    return dx


@triton.jit
def _forward(x_ptr: tl.tensor, y_ptr: tl.tensor, lanes: tl.tensor, shift: tl.tensor, K: tl.constexpr,
             ALPHA: tl.constexpr, BETA: tl.constexpr, WINDOW: tl.constexpr, RELU: tl.constexpr, FLOAT: tl.constexpr,
             N: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr) -> None:
    place = _place(lanes, shift, N, C, L, LAST)
    x = load(x_ptr, place, shift, WINDOW // 2, RELU, FLOAT, N, C, L, LAST)
    store(y_ptr, normalised(x, K, ALPHA, BETA, WINDOW, C), place, shift, N, C, L, LAST)


@triton.jit
def _backward(x_ptr: tl.tensor, g_ptr: tl.tensor, dx_ptr: tl.tensor, lanes: tl.tensor, shift: tl.tensor, K: tl.constexpr,
              ALPHA: tl.constexpr, BETA: tl.constexpr, WINDOW: tl.constexpr, RELU: tl.constexpr, FLOAT: tl.constexpr,
              N: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr) -> None:
    place = _place(lanes, shift, N, C, L, LAST)
    x = load(x_ptr, place, shift, 2 * (WINDOW // 2), RELU, FLOAT, N, C, L, LAST)
    g = load(g_ptr, place, shift, WINDOW // 2, False, FLOAT, N, C, L, LAST)
    store(dx_ptr, gradient(x, g, K, ALPHA, BETA, WINDOW, RELU, C), place, shift, N, C, L, LAST)


def takes(x: torch.Tensor, config: LrnConfig) -> bool:
    """Whether the kernels are made for this input: its type and the window."""
    return x.dtype in DTYPES and config.n <= WIDEST


def forward(x: torch.Tensor, y: torch.Tensor, config: LrnConfig, relu: bool) -> None:
    """Normalise maps x (M, N, S) into y (M, N, S), both contiguous; on the current stream of their device."""
    _launch(_forward, (x, y), config, relu)


def backward(x: torch.Tensor, grad: torch.Tensor, result: torch.Tensor, config: LrnConfig, relu: bool) -> None:
    """The gradient by x, given that by y (`grad`), into `result`; all (M, N, S) and contiguous."""
    _launch(_backward, (x, grad, result), config, relu)


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], config: LrnConfig, relu: bool) -> None:
    maps, n, shift = tensors[0].shape
    last = shift == 1
    if last:
        channels = math.gcd(n, 16 // max(t.element_size() for t in tensors))
        lanes = maps * n // channels
        programs = triton.cdiv(lanes, LANES)
    else:
        channels = min(n, CHANNELS)
        lanes = shift
        programs = maps * triton.cdiv(n, channels) * triton.cdiv(shift, LANES)
    wide = any(t.dtype == torch.float64 for t in tensors)
    with torch.cuda.device_of(tensors[0]):  # without effect on a CPU, in the interpreter
        kernel[(programs,)](*tensors, lanes, shift, K=config.k, ALPHA=config.alpha, BETA=config.beta, WINDOW=config.n,
                            RELU=relu, FLOAT=tl.float64 if wide else tl.float32, N=n, C=channels, L=LANES, LAST=last,
                            num_warps=LANES // 32)
