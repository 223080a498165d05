"""Triton's kernels in tests: on a GPU where there is one, else in Triton's interpreter on CPU tensors (tests/conftest.py)."""
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter round as a GPU does: an fma once, where it rounds the product too; bfloat16 to nearest even, where it
    truncates."""
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two float32 is exact in float64. The sum is rounded twice, which shows in 1 of 2^29 results.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, to)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_trunc", cast)
