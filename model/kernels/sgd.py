"""SGD of the paper's rule (§5) in one pass over memory: v <- momentum v + decay w + rate g; w <- w + v.

The arithmetic is that of `torch._foreach_mul_`, `addcmul_`, `addcmul_`, `add_` in this order: the same bits. Rates and the flag
that holds an update are read on the device, so a captured CUDA graph needs no new capture when they change."""
# Triton's language is typed when it compiles, and Triton need not be here.
# mypy: disable-error-code="import-not-found, import-untyped"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

SIZE = 1024  # elements of a program: 8 a thread


@triton.jit
def _update(w_ptr: tl.tensor, v_ptr: tl.tensor, g_ptr: tl.tensor, rate_ptr: tl.tensor, decay_ptr: tl.tensor,
            hold_ptr: tl.tensor, count: tl.tensor, MOMENTUM: tl.constexpr, SIZE: tl.constexpr) -> None:
    if tl.load(hold_ptr) == 0:
        i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        there = i < count
        w = tl.load(w_ptr + i, mask=there)
        v = tl.load(v_ptr + i, mask=there) * MOMENTUM
        v = tl.fma(w, tl.load(decay_ptr), v)
        v = tl.fma(tl.load(g_ptr + i, mask=there).to(tl.float32), tl.load(rate_ptr), v)
        w += v
        tl.store(v_ptr + i, v, mask=there)
        tl.store(w_ptr + i, w, mask=there)


def takes(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether the kernel is made for these parameters: float32, dense."""
    return all(p.dtype == torch.float32 and (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last))
               for p in parameters)


def update(parameters: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], *,
           momentum: float, rate: torch.Tensor, decay: torch.Tensor, hold: torch.Tensor) -> None:
    """Update parameters and velocities (float32) in place, on the current stream, one launch each.

    `rate`, `decay`: () float32, minus the learning rate, and weight decay times that. `hold`: () bool; while True nothing is
    written. Velocities have the parameters' memory format; a gradient (float32 or half precision) that has another is copied.
    All on one device."""
    for parameter, velocity, grad in zip(parameters, velocities, grads, strict=True):
        if grad.stride() != parameter.stride():
            grad = torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
        assert velocity.stride() == parameter.stride(), "not in the parameter's memory format"
        count = parameter.numel()
        with torch.cuda.device_of(parameter):
            _update[(triton.cdiv(count, SIZE),)](parameter, velocity, grad, rate, decay, hold.view(torch.uint8), count,
                                                 MOMENTUM=momentum, SIZE=SIZE)
