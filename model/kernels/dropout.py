"""ReLU and dropout of a fully connected layer in one pass each way; the mask is hashed in registers and never stored.

Forward draws the mask of model/dropout.py, bit for bit. Backward needs none: the result is positive where the neuron was active
and stayed. A program is R rows by C columns of (B, N). (The bias is added where the product is stored, by cuBLAS.)"""
# Triton's language is typed when it compiles, and Triton need not be here.
# mypy: disable-error-code="import-not-found, import-untyped"
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from model.dropout import threshold

R, C = 8, 256  # 16 elements a thread, of one hash each; 8 + 256 keys a program of two hashes each
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _hash32(x: tl.tensor) -> tl.tensor:
    """lowbias32, on uint32: see model/dropout.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _keys(words_ptr: tl.tensor, positions: tl.tensor) -> tl.tensor:
    first = tl.load(words_ptr).to(tl.uint32, bitcast=True)
    second = tl.load(words_ptr + 1).to(tl.uint32, bitcast=True)
    return _hash32(_hash32(positions.to(tl.uint32) ^ first) ^ second)


@triton.jit
def _forward(x_ptr: tl.tensor, y_ptr: tl.tensor, words_ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor, first_row: tl.tensor,
             first_column: tl.tensor, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr) -> None:
    row, column = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * C + tl.arange(0, C)
    row_keys, column_keys = _keys(words_ptr, first_row + row), _keys(words_ptr + 2, first_column + column)
    drawn = _hash32(row_keys[:, None] ^ column_keys[None, :]).to(tl.int32, bitcast=True)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    there = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
    active = tl.where(x < 0.0, 0.0, x)  # NaN stays
    y = active * tl.where(drawn >= THRESHOLD, SCALE, 0.0)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _backward(y_ptr: tl.tensor, g_ptr: tl.tensor, dx_ptr: tl.tensor, count: tl.tensor, SCALE: tl.constexpr,
              SIZE: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = i < count
    y = tl.load(y_ptr + i, mask=there, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + i, mask=there, other=0.0).to(tl.float32)
    dx = tl.where(y <= 0.0, 0.0, g * SCALE)  # NaN passes
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=there)


def takes(x: torch.Tensor, p: float) -> bool:
    """Whether the kernels are made for this input."""
    return x.dtype in DTYPES and x.dim() == 2 and p > 0.0


class ReluDropout(torch.autograd.Function):
    """apply(x, p, words, first_row, first_column): (B, N) → (B, N), as `dropout(relu(x))` of model/dropout.py; `words` (4,) int32
    on the device of x. It can be differentiated once. Equal to the twin but for the sign of zeros and where a result is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, words: torch.Tensor, first_row: int, first_column: int) -> torch.Tensor:
        x = x.contiguous()
        y, (rows, columns) = torch.empty_like(x), x.shape
        scale = torch.tensor(1.0 / (1.0 - p), dtype=x.dtype, device="cpu").item()  # rounded as the twin's factor
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(columns, C), triton.cdiv(rows, R))](x, y, words, rows, columns, first_row, first_column,
                                                                      THRESHOLD=threshold(p), SCALE=scale, R=R, C=C)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        y, = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(y)
        with torch.cuda.device_of(y):
            _backward[(triton.cdiv(y.numel(), R * C),)](y, grad, dx, y.numel(), SCALE=ctx.scale, SIZE=R * C)
        return dx, None, None, None, None
