"""Local response normalisation (paper §3.3), lean: b = a / (k + alpha Σ a²)^beta over n adjacent channels.

Element-wise arithmetic on the largest maps of the network: its time is the time that memory takes. What makes it cheap:
  chunks     a part at a time, so that every intermediate stays in the processor's cache;
  threads    each takes whole chunks. If torch divided every operator on a chunk among its threads, the barriers would
             cost ten times the arithmetic as soon as the loader's threads want the same cores (docs/lab-log.md);
  recompute  the backward pass keeps the input only and computes the sums again, in cache;
  one shift  maps lie between rows of padding, so the next channel is one shift of the flat buffer, by a map's size
             in NCHW and by 1 in channels_last, and windows are clipped at the ends without a branch;
  ReLU       the layer before it (paper §3.5) is applied on the way, which saves a pass over memory each way.
With beta = 3/4 the power s^-beta is r √r, where r = 1/√s.

Gradient, with f = s^-beta and W the sum over a window: dx = g f - 2 alpha beta x W(g x f / s).

Legend: B batch, C channels, G groups (towers), H row, W column. A map tensor is (M, N, S): N channels of one group and
the shift S between them in memory, (B·G, N, H·W) for NCHW and (B·H·W·G, N, 1) for channels_last. A chunk is (m, N, s),
some of the M and of the S; with its padding it is m·(N + n - 1)·s elements of a flat buffer.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from model.config import LrnConfig

# Elements of a chunk, padding included: 1 MiB in float32. Of 2^14 .. 2^21 it is within 5% of the best at 55×55, 27×27 and
# 15×15 pixels in both memory formats (docs/lab-log.md).
CHUNK = 1 << 18
# Python's lock is taken between operators, which last some 30 µs: more threads than this would wait for it.
MOST_THREADS = 8


def local_response_norm(x: torch.Tensor, config: LrnConfig, groups: int = 1, relu: bool = False) -> torch.Tensor:
    """Normalise over adjacent channels (paper §3.3): (B, C, H, W) → the same shape, dtype and memory format.

    Windows are clipped at the ends of each of the `groups` equal parts of C: one group per tower keeps them apart.
    With `relu`, x passes through max(x, 0) first. Arithmetic is in float32, or in float64 for float64 input. It can be
    differentiated once.
    `torch.nn.LocalResponseNorm` divides alpha by n: it equals this one when given alpha·n.
    Raises ValueError if C does not divide into the groups.
    """
    if x.dim() != 4 or x.shape[1] % groups:
        raise ValueError(f"input of LRN (={tuple(x.shape)}) must be (B, C, H, W) with C a multiple of {groups} groups; "
                         f"give each tower the same number of channels")
    if x.numel() == 0:
        return x
    result: torch.Tensor = _Lrn.apply(x, config, groups, relu)
    return result


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """The format to work in: that of x, if it has one of the two."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _as_maps(x: torch.Tensor, groups: int) -> torch.Tensor:
    """View (B, C, H, W), contiguous in either format, as maps (M, N, S)."""
    b, c, h, w = x.shape
    if _memory_format(x) is torch.channels_last:
        return x.permute(0, 2, 3, 1).view(b * h * w * groups, c // groups, 1)
    return x.view(b * groups, c // groups, h * w)


class _Scratch:
    """Buffers for chunks of up to (m, N, s), made once per thread and call."""

    def __init__(self, largest: tuple[int, int, int], config: LrnConfig, like: torch.Tensor) -> None:
        self.config = config
        maps, self.channels, width = largest
        size = maps * (self.channels + config.n - 1) * width
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # k is spread over the n terms of a window, padding included, which saves the pass that would add it.
        self.share = torch.full((), config.k / config.n, dtype=dtype, device=like.device)
        self.squares, self.terms, self.sums, self.spare = torch.zeros(4, size, dtype=dtype, device=like.device)
        self.x, self.g = torch.empty(2, maps * self.channels * width, dtype=dtype, device=like.device)
        self.resize(maps, width)

    def resize(self, maps: int, width: int) -> None:
        """Lay the buffers out for chunks of (maps, N, width)."""
        self.maps, self.shift = maps, width
        self.size = maps * (self.channels + self.config.n - 1) * width
        self.squares.fill_(self.config.k / self.config.n)
        self.terms.zero_()
        # The last n - 1 rows of sums belong to no window: 1 keeps their roots finite.
        self.sums.fill_(1.0)

    def view(self, flat: torch.Tensor, *, padded: bool) -> torch.Tensor:
        """The chunk in a flat buffer: past the leading padding, or where windows begin and sums stand."""
        first = self.config.n // 2 if padded else 0
        rows = flat[:self.size].view(self.maps, self.channels + self.config.n - 1, self.shift)
        return rows[:, first:first + self.channels]

    def dense(self, flat: torch.Tensor) -> torch.Tensor:
        """The chunk in a flat buffer without padding."""
        return flat[:self.maps * self.channels * self.shift].view(self.maps, self.channels, self.shift)

    def window_sums(self, flat: torch.Tensor) -> torch.Tensor:
        """Sums over n adjacent channels of a padded flat buffer, in `sums`; overwrites `spare`."""
        n, shift, size = self.config.n, self.shift, self.size
        end = size - (n - 1) * shift
        flat, sums = flat[:size], self.sums[:size]
        if n == 1:
            return sums.copy_(flat)
        # n is odd: (n - 1)/2 pairs and the last. For n = 5: 3 additions, not 4.
        pairs = torch.add(flat[:size - shift], flat[shift:], out=self.spare[:size - shift])
        torch.add(pairs[:end], pairs[2 * shift:][:end] if n > 3 else flat[2 * shift:], out=sums[:end])
        for j in range(4, n, 2):
            sums[:end].add_(pairs[j * shift:][:end] if j < n - 1 else flat[j * shift:])
        return sums

    def load(self, source: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """A chunk in the precision of the arithmetic: itself, or a copy in `buffer`."""
        return source if source.dtype == buffer.dtype else self.dense(buffer).copy_(source)

    def rectified(self, source: torch.Tensor, relu: bool) -> torch.Tensor:
        """A chunk of the input, through the ReLU if there is one."""
        if (source.shape[0], source.shape[2]) != (self.maps, self.shift):
            self.resize(source.shape[0], source.shape[2])
        x = self.load(source, self.x)
        return torch.clamp_min(x, 0.0, out=self.dense(self.x)) if relu else x

    def powers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For a chunk of (rectified) input: s^-beta and 1/s or, for beta = 3/4, its root; flat, where windows begin."""
        torch.addcmul(self.share, x, x, value=self.config.alpha, out=self.view(self.squares, padded=True))
        s = self.window_sums(self.squares)
        power = self.spare[:self.size]
        if self.config.beta == 0.75:
            root = s.rsqrt_()
            return torch.sqrt(root, out=power).mul_(root), root
        torch.pow(s, -self.config.beta, out=power)
        return power, s.reciprocal_()


def _in_chunks(tensors: tuple[torch.Tensor, ...], config: LrnConfig,
               work: Callable[[_Scratch, tuple[torch.Tensor, ...]], None]) -> None:
    """Call `work` with each chunk of maps (M, N, S), on as many threads as torch has."""
    maps, channels, width = tensors[0].shape
    rows = channels + config.n - 1
    on_cpu = tensors[0].device.type == "cpu"
    # A GPU takes everything at once: there a chunk would only be another launch.
    limit = CHUNK if on_cpu else maps * rows * width
    m = max(1, min(maps, limit // (rows * width)))
    s = max(1, min(width, limit // (rows * m)))
    places = [(i, j) for i in range(0, maps, m) for j in range(0, width, s)]
    # Threads take chunks from one iterator, as they come: one that has to wait for a core holds nobody up.
    chunks: Iterator[tuple[int, int]] = iter(places)

    @torch.no_grad()  # a setting of each thread
    def run() -> None:
        scratch = _Scratch((m, channels, s), config, tensors[0])
        for i, j in chunks:
            work(scratch, tuple(t[i:i + m, :, j:j + s] for t in tensors))

    torch_threads = torch.get_num_threads()
    threads = min(torch_threads, MOST_THREADS, len(places)) if on_cpu else 1
    if threads == 1:
        run()
        return
    # One thread for each operator: this one's setting, and what the new ones start with.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(run) for _ in range(threads - 1)]
            run()
            for other in others:
                other.result()
    finally:
        torch.set_num_threads(torch_threads)


class _Lrn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, config: LrnConfig, groups: int, relu: bool) -> torch.Tensor:
        x = x.contiguous(memory_format=_memory_format(x))
        y = torch.empty_like(x)

        def normalise(scratch: _Scratch, chunks: tuple[torch.Tensor, ...]) -> None:
            source, target = chunks
            x = scratch.rectified(source, relu)
            power = scratch.view(scratch.powers(x)[0], padded=False)
            if target.dtype == x.dtype:
                torch.mul(x, power, out=target)
            else:
                target.copy_(power.mul_(x))

        _in_chunks((_as_maps(x, groups), _as_maps(y, groups)), config, normalise)
        ctx.save_for_backward(x)
        ctx.constants = config, groups, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, = ctx.saved_tensors
        config, groups, relu = ctx.constants
        result = torch.empty_like(x)

        def differentiate(scratch: _Scratch, chunks: tuple[torch.Tensor, ...]) -> None:
            source, gradient, target = chunks
            x = scratch.rectified(source, relu)
            g = scratch.load(gradient, scratch.g)
            power, inverse = scratch.powers(x)
            dx = torch.mul(g, scratch.view(power, padded=False),
                           out=target if target.dtype == x.dtype else scratch.dense(scratch.g))
            if config.beta == 0.75:
                inverse.mul_(inverse)
            inner = scratch.view(scratch.terms, padded=True)
            torch.mul(dx, scratch.view(inverse, padded=False), out=inner).mul_(x)
            sums = scratch.view(scratch.window_sums(scratch.terms), padded=False)
            dx.addcmul_(sums, x, value=-2.0 * config.alpha * config.beta)
            if relu:
                torch.ops.aten.threshold_backward.grad_input(dx, x, 0.0, grad_input=dx)
            if dx is not target:
                target.copy_(dx)

        grad = grad.contiguous(memory_format=_memory_format(x))
        _in_chunks(tuple(_as_maps(t, groups) for t in (x, grad, result)), config, differentiate)
        return result, None, None, None
