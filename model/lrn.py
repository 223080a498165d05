"""Local response normalisation, LRN (paper §3.3): b = a / (k + alpha Σ a²)^beta over n adjacent channels.

Element-wise arithmetic on the largest maps of the network: its time is the time that memory takes. What makes it cheap:
  chunks     some maps at a time, so that every intermediate stays in the processor's cache;
  recompute  the backward pass keeps the input only and computes the sums again, in cache;
  one shift  maps lie between rows of padding, so the next channel is one shift of the flat buffer, by a map's size in NCHW and
             by 1 in channels_last, and windows are clipped at the ends without a branch;
  ReLU       the layer before it (paper §3.5) is applied on the way, which saves a pass over memory each way.

With beta = 3/4 the power s^-beta is r √r, where r = 1/√s. A GPU does all of it in one kernel each way, model/kernels/lrn.py.
Gradient, with f = s^-beta and W the sum over a window: dx = g f - 2 alpha beta x W(g x f / s).

B batch, C channels, G groups (towers), H row, W column. A map tensor is (M, N, S): N channels of one group and the shift S
between them in memory, (B·G, N, H·W) for NCHW and (B·H·W·G, N, 1) for channels_last. P elements of one of the M maps with its
padding: (N + n - 1)·S."""
import importlib
from types import ModuleType
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.config import Kernels, LrnConfig, PoolConfig
from model.kernels import takes_triton

# Elements of a chunk for each thread of a CPU: 1 MiB in float32. Of 2^14 .. 2^21 it is within 5% of the best at 55×55,
# 27×27 and 15×15 pixels in both memory formats (docs/lab-log.md).
CHUNK = 1 << 18


def local_response_norm(x: torch.Tensor, config: LrnConfig, groups: int = 1, relu: bool = False,
                        kernels: Kernels = "auto") -> torch.Tensor:
    """Normalise over adjacent channels (paper §3.3): (B, C, H, W) → the same shape, dtype and memory format.

    Windows are clipped at the ends of each of the `groups` equal parts of C (else ValueError): one group per tower keeps them
    apart. With `relu`, x passes through max(x, 0) first. Arithmetic is in float32, or in float64 for float64 input. It can be
    differentiated once. `kernels`: Triton's or these chunks, see model/kernels. `torch.nn.LocalResponseNorm` divides alpha by n:
    it equals this one when given alpha·n."""
    _check(x, groups)
    if x.numel() == 0:
        return x
    result: torch.Tensor = _Lrn.apply(x, config, groups, relu, kernels)
    return result


def local_response_norm_pool(x: torch.Tensor, config: LrnConfig, pool: PoolConfig, groups: int = 1, relu: bool = False,
                             kernels: Kernels = "auto") -> torch.Tensor:
    """`max_pool2d` of `local_response_norm`: (B, C, H, W) → (B, C, P, Q). Where Triton's kernels take x, channels_last, it is one
    pass each way, which keeps a byte for each window, and no map between the two. The results are the same; in half precision
    the gradient goes to what was larger before rounding, where the two see a tie and take the first."""
    _check(x, groups)
    if x.numel() and takes_triton(kernels, x.device):
        module = importlib.import_module("model.kernels.lrn_pool")
        if module.takes(x, config, pool):
            result: torch.Tensor = _LrnPool.apply(x, config, pool, groups, relu, module)
            return result
    return functional.max_pool2d(local_response_norm(x, config, groups, relu, kernels), pool.px, pool.stride)


def _check(x: torch.Tensor, groups: int) -> None:
    if x.dim() != 4 or x.shape[1] % groups:
        raise ValueError(f"input of LRN (={tuple(x.shape)}) must be (B, C, H, W) with C a multiple of {groups} groups; "
                         f"give each tower the same number of channels")


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
    """Buffers for one chunk of maps, made once per call and reused for every chunk."""

    def __init__(self, maps: torch.Tensor, config: LrnConfig) -> None:
        self.config = config
        count, self.channels, self.shift = maps.shape
        # A GPU takes everything at once: there a chunk would only be another launch.
        chunk = CHUNK * torch.get_num_threads() if maps.device.type == "cpu" else maps.numel()
        self.maps = max(1, min(count, chunk // (self.channels * self.shift)))
        self.pitch = (self.channels + config.n - 1) * self.shift
        dtype = torch.float64 if maps.dtype == torch.float64 else torch.float32

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=maps.device)

        # k is spread over the n terms of a window, padding included, which saves the pass that would add it.
        self.share = torch.full((), config.k / config.n, dtype=dtype, device=maps.device)
        self.squares = empty(self.maps * self.pitch).fill_(config.k / config.n)
        self.terms = empty(self.maps * self.pitch).zero_()
        # The last n - 1 rows of sums belong to no window: 1 keeps their roots finite.
        self.sums = empty(self.maps * self.pitch).fill_(1.0)
        self.spare = empty(self.maps * self.pitch).zero_()
        self.x = empty(self.maps, self.channels, self.shift)
        self.g = empty(self.maps, self.channels, self.shift)

    def view(self, flat: torch.Tensor, maps: int, *, padded: bool) -> torch.Tensor:
        """Maps (M, N, S) in a flat buffer (M·P): past the leading padding, or where windows begin and sums stand."""
        first = self.config.n // 2 if padded else 0
        rows = flat[:maps * self.pitch].view(maps, self.channels + self.config.n - 1, self.shift)
        return rows[:, first:first + self.channels]

    def window_sums(self, flat: torch.Tensor) -> torch.Tensor:
        """Sums over n adjacent channels of a padded flat buffer, in `sums`; overwrites `spare`."""
        n, shift, size = self.config.n, self.shift, flat.numel()
        end = size - (n - 1) * shift
        sums = self.sums[:size]
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
        return source if source.dtype == buffer.dtype else buffer[:source.shape[0]].copy_(source)

    def rectified(self, source: torch.Tensor, relu: bool) -> torch.Tensor:
        """A chunk of the input, through the ReLU if there is one."""
        x = self.load(source, self.x)
        return torch.clamp_min(x, 0.0, out=self.x[:x.shape[0]]) if relu else x

    def powers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For a chunk of (rectified) input: s^-beta and 1/s or, for beta = 3/4, its root; flat, where windows begin."""
        size = x.shape[0] * self.pitch
        squares = self.squares[:size]
        torch.addcmul(self.share, x, x, value=self.config.alpha, out=self.view(squares, x.shape[0], padded=True))
        s = self.window_sums(squares)
        power = self.spare[:size]
        if self.config.beta == 0.75:
            root = s.rsqrt_()
            return torch.sqrt(root, out=power).mul_(root), root
        torch.pow(s, -self.config.beta, out=power)
        return power, s.reciprocal_()


def _forward_in_chunks(x: torch.Tensor, y: torch.Tensor, config: LrnConfig, relu: bool) -> None:
    scratch = _Scratch(x, config)
    for source, target in zip(x.split(scratch.maps), y.split(scratch.maps)):
        chunk = scratch.rectified(source, relu)
        power = scratch.view(scratch.powers(chunk)[0], len(chunk), padded=False)
        if target.dtype == chunk.dtype:
            torch.mul(chunk, power, out=target)
        else:
            target.copy_(power.mul_(chunk))


def _backward_in_chunks(x: torch.Tensor, grad: torch.Tensor, result: torch.Tensor, config: LrnConfig, relu: bool) -> None:
    """The gradient by x, given that by y (`grad`), into `result`; all are maps (M, N, S)."""
    scratch = _Scratch(x, config)
    for source, gradient, target in zip(*(t.split(scratch.maps) for t in (x, grad, result))):
        chunk, maps = scratch.rectified(source, relu), len(source)
        g = scratch.load(gradient, scratch.g)
        power, inverse = scratch.powers(chunk)
        dx = target if target.dtype == chunk.dtype else scratch.g[:maps]
        torch.mul(g, scratch.view(power, maps, padded=False), out=dx)
        if config.beta == 0.75:
            inverse.mul_(inverse)
        terms = scratch.terms[:maps * scratch.pitch]
        inner = scratch.view(terms, maps, padded=True)
        torch.mul(dx, scratch.view(inverse, maps, padded=False), out=inner).mul_(chunk)
        sums = scratch.view(scratch.window_sums(terms), maps, padded=False)
        dx.addcmul_(sums, chunk, value=-2.0 * config.alpha * config.beta)
        if relu:
            torch.ops.aten.threshold_backward.grad_input(dx, chunk, 0.0, grad_input=dx)
        if dx is not target:
            target.copy_(dx)


def _kernels(x: torch.Tensor, config: LrnConfig, kernels: Kernels) -> Optional[ModuleType]:
    """model.kernels.lrn, which is imported only where Triton is used; None for the chunks."""
    if not takes_triton(kernels, x.device):
        return None
    module = importlib.import_module("model.kernels.lrn")
    return module if module.takes(x, config) else None


class _Lrn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, config: LrnConfig, groups: int, relu: bool, choice: Kernels) -> torch.Tensor:
        x = x.contiguous(memory_format=_memory_format(x))
        y = torch.empty_like(x)
        kernels = _kernels(x, config, choice)
        (kernels.forward if kernels else _forward_in_chunks)(_as_maps(x, groups), _as_maps(y, groups), config, relu)
        ctx.save_for_backward(x)
        ctx.constants = config, groups, relu, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        x, = ctx.saved_tensors
        config, groups, relu, kernels = ctx.constants
        result = torch.empty_like(x)
        grad = grad.contiguous(memory_format=_memory_format(x))
        (kernels.backward if kernels else _backward_in_chunks)(
            _as_maps(x, groups), _as_maps(grad, groups), _as_maps(result, groups), config, relu)
        return result, None, None, None, None


class _LrnPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, config: LrnConfig, pool: PoolConfig, groups: int, relu: bool,
                module: ModuleType) -> torch.Tensor:
        b, c, h, w = x.shape
        sides = ((side - pool.px) // pool.stride + 1 for side in (h, w))
        y = torch.empty(b, c, *sides, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        places = torch.empty_like(y, dtype=torch.uint8)
        module.forward(x, y, places, config, pool, groups, relu)
        ctx.save_for_backward(x, places)
        ctx.constants = config, pool, groups, relu
        ctx.module = module
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        x, places = ctx.saved_tensors
        result = torch.empty_like(x)
        ctx.module.backward(x, grad.contiguous(memory_format=torch.channels_last), places, result, *ctx.constants)
        return result, None, None, None, None, None
